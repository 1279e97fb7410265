/** Requests to the server, in fal's format. */

/**
 * @typedef {{x1: number, y1: number, x2: number, y2: number}} Region corners in thousandths of width and height
 * @typedef {{slug: string, token: string, needs: "nothing" | "text" | "region" | "text+region",
 *   output: "boxes" | "quads" | "polygons" | "text", description: string, is_own: boolean}} Task
 * @typedef {{model: string, provider: string, precision: string, auth: boolean, prefix: string, tasks: Task[],
 *   samples: {name: string, url: string, width: number, height: number}[], max_bytes: number}} Config
 * @typedef {{x: number, y: number}} Point
 * @typedef {{quads: Point[][], polygons: {points: Point[], label: string}[], text: string, truncated: boolean | string,
 *   scores?: (number | null)[], presence?: Record<string, number | null>}} Extra
 * @typedef {{part: "text", text: string} | {part: "box" | "quad" | "polygon" | "word", index: number, item: any, quad?: Point[]}} Part
 * @typedef {{name: string, ms: number}} Stage
 * @typedef {object} Result
 * @property {any} body fal's JSON
 * @property {Extra | undefined} extra fields that fal's JSON does not have
 * @property {Stage[]} stages the server's time by stage
 * @property {number} totalMs from the request to the last byte of the response
 */

const DATA = "data: ";
/** A comment of the stream, which other clients ignore. */
const TIMING = ": server-timing ";

/** An error response, or no response at all. */
export class ServerError extends Error {
  /**
   * @param {number} status HTTP status; 0 if the server could not be reached
   * @param {any} body the JSON of the response; null if there is none
   * @param {string} [requestId]
   */
  constructor(status, body, requestId = "") {
    super(`HTTP ${status}`);
    this.status = status;
    this.body = body;
    this.requestId = requestId;
  }
}

/** @returns {Promise<Config>} */
export async function loadConfig() {
  const response = await fetch("playground/config.json").catch(() => null);
  if (!response?.ok) throw new ServerError(response?.status ?? 0, null);
  return response.json();
}

/**
 * Runs one task; its answer comes in parts.
 * @param {string} endpoint such as "fal-ai/florence-2-large/ocr"
 * @param {{image_url: string, text_input?: string, classes?: string[], region?: Region, scores?: boolean}} input
 * @param {{key: string, signal: AbortSignal, onPart: (part: Part) => void}} options
 * @returns {Promise<Result>}
 */
export async function runTask(endpoint, input, { key, signal, onPart }) {
  const headers = { "Content-Type": "application/json", "X-Florence-Extra": "1" };
  if (key) headers.Authorization = `Key ${key}`;
  const start = performance.now();
  const response = await send(`${endpoint}/stream`, { method: "POST", headers, body: JSON.stringify(input), signal });
  const requestId = response.headers.get("x-fal-request-id") ?? "";
  if (!response.ok) throw new ServerError(response.status, await response.json().catch(rethrowAbort), requestId);
  let stages = [];
  let last = null;
  for await (const line of linesOf(response.body)) {
    if (line.startsWith(TIMING)) stages = parseServerTiming(line.slice(TIMING.length));
    if (!line.startsWith(DATA)) continue;
    const event = JSON.parse(line.slice(DATA.length));
    if (event.part) onPart(event);
    else last = event;
  }
  const totalMs = performance.now() - start;
  if (last === null) throw new ServerError(0, null, requestId);
  if (last.detail !== undefined) throw new ServerError(500, last, requestId);
  const { extra, ...falJson } = last;
  return { body: falJson, extra, stages, totalMs };
}

/** @param {ReadableStream<Uint8Array>} stream */
async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      yield* lines;
    }
  } catch (error) {
    rethrowAbort(error);
    throw new ServerError(0, null);
  }
  if (rest) yield rest;
}

async function send(endpoint, request) {
  try {
    return await fetch(endpoint, request);
  } catch (error) {
    rethrowAbort(error);
    throw new ServerError(0, null);
  }
}

function rethrowAbort(error) {
  if (error.name === "AbortError") throw error;
  return null;
}

/**
 * Parses a `Server-Timing` header, such as `vision;dur=12.0, decode;dur=8.5`.
 * @param {string} header
 * @returns {Stage[]}
 */
function parseServerTiming(header) {
  return header
    .split(",")
    .map((entry) => /^\s*([^;\s]+)\s*;.*?dur=([\d.]+)/.exec(entry))
    .filter((match) => match !== null)
    .map(([, name, ms]) => ({ name, ms: Number(ms) }));
}
