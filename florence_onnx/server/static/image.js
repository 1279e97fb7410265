/** The image that is asked about: from a file, the clipboard or a sample. */

/**
 * @typedef {object} ChosenImage
 * @property {string} name file name, for people and for the code to copy
 * @property {Blob} blob the bytes as they came
 * @property {string} url address of the bytes inside this page
 * @property {number} width in pixels, upright
 * @property {number} height in pixels, upright
 */

/** An image that cannot be used; the message is for the person at the page. */
export class ImageError extends Error {}

/**
 * Loads what was chosen, dropped or pasted.
 * @param {File} file
 * @param {number} maxBytes
 * @returns {Promise<ChosenImage>}
 */
export async function fromFile(file, maxBytes) {
  if (file.size === 0) throw new ImageError(`“${file.name}” is empty. Choose another file.`);
  if (file.size > maxBytes) {
    throw new ImageError(
      `“${file.name}” has ${megabytes(file.size)}; this server takes ${megabytes(maxBytes)} at most. Choose or make a smaller one.`,
    );
  }
  return decode(file.name, file);
}

/**
 * Loads a sample of the server.
 * @param {{name: string, url: string}} sample
 * @returns {Promise<ChosenImage>}
 */
export async function fromSample(sample) {
  const response = await fetch(sample.url).catch(() => null);
  if (!response?.ok) throw new ImageError(`The sample “${sample.name}” could not be loaded. Is the server still running?`);
  const fileName = new URL(sample.url, location.href).pathname.split("/").pop() || sample.name;
  return decode(fileName, await response.blob());
}

/** @param {ChosenImage} image */
export const release = (image) => URL.revokeObjectURL(image.url);

/**
 * The image's bytes, untouched, as the `data:` URI that fal's `image_url` takes.
 * @param {ChosenImage} image
 * @returns {Promise<string>}
 */
export function toDataUri(image) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new ImageError(`“${image.name}” could not be read again. Choose it once more.`));
    reader.readAsDataURL(image.blob);
  });
}

/** @param {number} bytes */
export const megabytes = (bytes) => `${(bytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;

async function decode(name, blob) {
  const url = URL.createObjectURL(blob);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw new ImageError(`“${name}” is not an image that this browser can show. Choose a PNG, JPEG, WebP or GIF.`);
  }
  return { name, blob, url, width: image.naturalWidth, height: image.naturalHeight };
}
