/** Error messages: what happened, and what to do about it. */

import { ServerError } from "./client.js";
import { megabytes, ImageError } from "./image.js";

/**
 * @typedef {object} Problem
 * @property {string} message what happened and what to do
 * @property {string} [detail] the server's message
 * @property {"text" | "region" | "key" | "image"} [field] the field to correct
 */

/** An input that is missing or invalid. */
export class InputError extends Error {
  /**
   * @param {string} message
   * @param {Problem["field"]} field
   */
  constructor(message, field) {
    super(message);
    this.field = field;
  }
}

const BY_STATUS = {
  0: "The server cannot be reached. Check that it is running, then press Run again.",
  404: "This server does not have this task.",
  429: "The server is busy. Wait a moment, then press Run again.",
  499: "The request was cancelled because the connection was lost. Press Run again.",
  503: "The server is starting or shutting down. Wait a moment, then press Run again.",
  504: "The request timed out. Press Run again, or try a smaller image.",
};

/**
 * Turns an error into a message for the user.
 * @param {any} error
 * @param {{key: string, maxBytes: number}} context
 * @returns {Problem}
 */
export function explain(error, { key, maxBytes }) {
  if (error instanceof InputError) return { message: error.message, field: error.field };
  if (error instanceof ImageError) return { message: error.message, field: "image" };
  if (!(error instanceof ServerError)) return { message: "Something went wrong in this page. Reload it and try again.", detail: String(error) };
  if (error.status === 422) return explainInvalid(error.body?.detail);
  const detail = typeof error.body?.detail === "string" ? error.body.detail : undefined;
  if (error.status === 401) return explainKey(key, detail);
  if (error.status === 413) {
    return { message: `The image is too large: this server accepts at most ${megabytes(maxBytes)}. Use a smaller one.`, detail };
  }
  return { message: BY_STATUS[error.status] ?? explainFault(error), detail };
}

function explainKey(key, detail) {
  const message = key ? "The server does not accept this API key. Check it." : "This server requires an API key. Enter it in the field above.";
  return { message, detail, field: "key" };
}

function explainFault(error) {
  const where = error.requestId ? ` under request ${error.requestId}` : "";
  return `Something went wrong on the server (HTTP ${error.status}). Its log has the details${where}.`;
}

/** @returns {Problem} */
function explainInvalid(detail) {
  if (!Array.isArray(detail) || !detail.length) return { message: "The server rejected the request.", detail: detail && String(detail) };
  const [first] = detail;
  const field = (first.loc ?? []).find((part) => ["image_url", "text_input", "region"].includes(part));
  return { ...explainField(field, String(first.type ?? "")), detail: first.msg };
}

/** @returns {Problem} */
function explainField(field, type) {
  if (field === "text_input") {
    return { message: type === "missing" ? "This task needs a text. Enter one first." : "The server cannot use this text. Change it, then press Run again.", field: "text" };
  }
  if (field === "region") {
    return { message: type === "missing" ? "Draw a region on the image first." : "The server cannot use this region. Draw it again.", field: "region" };
  }
  if (field === "image_url") return { message: explainImage(type), field: "image" };
  return { message: "The server rejected the request." };
}

function explainImage(type) {
  if (type.endsWith("too_large")) return "The image is too large for this server. Use a smaller one.";
  if (type.endsWith("too_small")) return "The image is too small for this server. Use a larger one.";
  return "The server cannot read this image. It may be damaged or in an unsupported format. Try a PNG or JPEG.";
}
