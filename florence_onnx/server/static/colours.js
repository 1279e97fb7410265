/** Colours of labels, the same as in the server's annotated images (`florence_onnx/answers/draw.py`). */

const NUM_HUES = 24;
const LIGHTNESSES = [46, 62];
const GOLDEN_ANGLE = 0.381966;

/**
 * Returns the colour of a shape. A label has the same colour in every image; shapes without a label are told apart by it.
 * @param {string} label
 * @param {number} index position among the shapes of the result
 * @returns {{colour: string, ink: string}} the colour, and black or white for text on it
 */
export function colourOf(label, index) {
  if (!label) return colour(((index * GOLDEN_ANGLE) % 1) * 360, LIGHTNESSES[0]);
  const number = crc32(new TextEncoder().encode(label));
  return colour(((number % NUM_HUES) / NUM_HUES) * 360, LIGHTNESSES[Math.floor(number / NUM_HUES) % LIGHTNESSES.length]);
}

function colour(hue, lightness) {
  const [red, green, blue] = toRgb(hue, 0.85, lightness / 100);
  const isBright = 0.299 * red + 0.587 * green + 0.114 * blue > 130;
  return { colour: `rgb(${red} ${green} ${blue})`, ink: isBright ? "#000" : "#fff" };
}

function toRgb(hue, saturation, lightness) {
  const reach = saturation * Math.min(lightness, 1 - lightness);
  const channel = (offset) => {
    const k = (offset + hue / 30) % 12;
    return Math.round(255 * (lightness - reach * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

/** @param {Uint8Array} bytes */
function crc32(bytes) {
  let remainder = ~0;
  for (const byte of bytes) {
    remainder ^= byte;
    for (let bit = 0; bit < 8; bit++) remainder = (remainder >>> 1) ^ (remainder & 1 ? 0xedb88320 : 0);
  }
  return ~remainder >>> 0;
}
