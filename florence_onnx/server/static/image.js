/** The input image: from a file, the clipboard or a sample. */

/**
 * @typedef {object} ChosenImage
 * @property {string} name file name, shown on the page and used in the code
 * @property {Blob} blob the file, unchanged
 * @property {string} url object URL of the file
 * @property {number} width in pixels, EXIF orientation applied
 * @property {number} height in pixels, EXIF orientation applied
 */

/** An image that cannot be used; the message is shown on the page. */
export class ImageError extends Error {}

/**
 * Loads a file that was chosen, dropped or pasted.
 * @param {File} file
 * @param {number} maxBytes
 * @returns {Promise<ChosenImage>}
 */
export async function fromFile(file, maxBytes) {
  if (file.size === 0) throw new ImageError(`“${file.name}” is empty. Choose another file.`);
  if (file.size > maxBytes) {
    throw new ImageError(
      `“${file.name}” is ${megabytes(file.size)}, and this server accepts at most ${megabytes(maxBytes)}. Choose a smaller image.`,
    );
  }
  return decode(file.name, file);
}

/**
 * Loads a sample image from the server.
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
 * Encodes the file, unchanged, as a `data:` URI for fal's `image_url`.
 * @param {ChosenImage} image
 * @returns {Promise<string>}
 */
export function toDataUri(image) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new ImageError(`“${image.name}” can no longer be read. Choose it again.`));
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
