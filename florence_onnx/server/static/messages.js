/** What the page says when something goes wrong: what happened, and what to do. */

import { ServerError } from "./client.js";
import { megabytes, ImageError } from "./image.js";

/**
 * @typedef {object} Problem
 * @property {string} message what happened and what to do
 * @property {string} [detail] the server's own words
 * @property {"text" | "region" | "key" | "image"} [field] where it can be put right
 */

/** A question that is not complete. */
export class QuestionError extends Error {
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
  0: "The server cannot be reached. See whether it is still running, then press Run again.",
  404: "This server does not have this task.",
  429: "The server is busy. Wait a moment, then press Run again.",
  499: "The server stopped working on this question because the connection was lost. Press Run again.",
  503: "The server is not ready yet. Wait a moment, then press Run again.",
  504: "The server took longer than it may. Try a smaller image, or start it with more time per request.",
};

/**
 * Turns an error into what a person can use.
 * @param {any} error
 * @param {{key: string, maxBytes: number}} context
 * @returns {Problem}
 */
export function explain(error, { key, maxBytes }) {
  if (error instanceof QuestionError) return { message: error.message, field: error.field };
  if (error instanceof ImageError) return { message: error.message, field: "image" };
  if (!(error instanceof ServerError)) return { message: "This page has a fault. Reload it and try again.", detail: String(error) };
  if (error.status === 422) return explainInvalid(error.body?.detail);
  const detail = typeof error.body?.detail === "string" ? error.body.detail : undefined;
  if (error.status === 401) return explainKey(key, detail);
  if (error.status === 413) {
    return { message: `The image is too large: this server takes ${megabytes(maxBytes)} at most. Use a smaller one.`, detail };
  }
  return { message: BY_STATUS[error.status] ?? explainFault(error), detail };
}

function explainKey(key, detail) {
  const message = key ? "The server does not accept this API key. Check it." : "This server wants an API key. Type it in the field above.";
  return { message, detail, field: "key" };
}

function explainFault(error) {
  const where = error.requestId ? ` under request ${error.requestId}` : "";
  return `Something went wrong inside the server (HTTP ${error.status}). Its log says more${where}.`;
}

/** @returns {Problem} */
function explainInvalid(detail) {
  if (!Array.isArray(detail) || !detail.length) return { message: "The server did not understand the question.", detail: detail && String(detail) };
  const [first] = detail;
  const field = (first.loc ?? []).find((part) => ["image_url", "text_input", "region"].includes(part));
  return { ...explainField(field, String(first.type ?? "")), detail: first.msg };
}

/** @returns {Problem} */
function explainField(field, type) {
  if (field === "text_input") {
    return { message: type === "missing" ? "Type a text for this task first." : "The server cannot use this text. Change it, then press Run again.", field: "text" };
  }
  if (field === "region") {
    return { message: type === "missing" ? "Draw a region on the image first." : "The server cannot use this region. Draw it again.", field: "region" };
  }
  if (field === "image_url") return { message: explainImage(type), field: "image" };
  return { message: "The server did not understand the question." };
}

function explainImage(type) {
  if (type.endsWith("too_large")) return "The image is too large for this server. Use a smaller one.";
  if (type.endsWith("too_small")) return "The image is too small for this server. Use a larger one.";
  return "The server cannot read this image. It may be damaged, or of a kind that the server does not know: try a PNG or JPEG.";
}
