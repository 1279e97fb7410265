/** The result panel: rows or text, and the time by stage. */

import { make } from "./dom.js";

/**
 * @typedef {import("./client.js").Result} Result
 * @typedef {import("./shapes.js").Shape} Shape
 */

const STAGES = {
  queue: "Queue",
  load: "Load image",
  vision: "Vision encoder",
  decode: "Decoder",
  draw: "Draw preview",
};
const REST = "Network";

/**
 * Shows a result.
 * @param {HTMLElement} container
 * @param {Result} result
 * @param {Shape[]} shapes
 * @param {{onHover: (index: number | null) => void, onPick: (index: number) => void}} listeners
 */
export function showResult(container, result, shapes, listeners) {
  const { body, extra } = result;
  const main = typeof body.results === "string" ? makeText(body.results) : makeRows(shapes, listeners);
  container.replaceChildren(main, ...makePresence(result), ...makeExtras(extra));
}

/**
 * Highlights one row.
 * @param {HTMLElement} container
 * @param {number | null} index
 * @param {number | null} pinned
 */
export function highlightRow(container, index, pinned) {
  for (const row of container.querySelectorAll(".row")) {
    const isActive = Number(row.dataset.index) === index;
    row.classList.toggle("is-active", isActive);
    row.setAttribute("aria-pressed", String(Number(row.dataset.index) === pinned));
    if (isActive) scrollIntoList(row);
  }
}

/**
 * Summarizes a result in one line.
 * @param {Result} result
 * @param {Shape[]} shapes
 */
export function summarize({ body, totalMs }, shapes) {
  const what = typeof body.results === "string" ? "text" : count(shapes);
  return `Done: ${what} in ${milliseconds(totalMs)}.`;
}

/**
 * Shows the time by stage.
 * @param {HTMLElement} container
 * @param {Result} result
 */
export function showTimings(container, { stages, totalMs }) {
  const known = stages.reduce((sum, { ms }) => sum + ms, 0);
  const rest = { name: "rest", title: REST, ms: Math.max(0, totalMs - known) };
  const all = [...stages.map((stage) => ({ ...stage, title: STAGES[stage.name] ?? stage.name })), rest];
  const bar = make("div", { className: "bar", "aria-hidden": "true" }, ...all.map(makeBarPart));
  const list = make("dl", {}, ...all.map(makeStage), make("div", { className: "total" }, ...makeTerm("Total", totalMs)));
  container.replaceChildren(make("h3", { textContent: "Time" }), bar, list);
}

function makeText(text) {
  return text
    ? make("blockquote", { className: "text-result", textContent: text })
    : make("p", { className: "muted", textContent: "The model returned an empty text." });
}

function makeRows(shapes, { onHover, onPick }) {
  if (!shapes.length) return make("p", { className: "muted", textContent: "Nothing found." });
  const rows = make("ol", { className: "rows", "aria-label": "Shapes found" });
  rows.append(...shapes.map((shape, index) => make("li", {}, makeRow(shape, index, onPick))));
  for (const row of rows.querySelectorAll(".row")) {
    const index = Number(row.dataset.index);
    for (const type of ["pointerenter", "focus"]) row.addEventListener(type, () => onHover(index));
    for (const type of ["pointerleave", "blur"]) row.addEventListener(type, () => onHover(null));
  }
  rows.addEventListener("keydown", moveFocus);
  return rows;
}

function makeRow({ name, label, place, colour, score }, index, onPick) {
  const swatch = make("span", { className: "swatch" });
  swatch.style.background = colour;
  return make(
    "button",
    { type: "button", className: "row", data: { index }, "aria-pressed": "false", onclick: () => onPick(index) },
    swatch,
    make("span", { className: label ? "label" : "label is-unnamed", textContent: name }),
    ...(score === null ? [] : [make("span", { className: "score", title: `Score ${score}`, textContent: score.toFixed(3) })]),
    make("span", { className: "place muted", textContent: place }),
  );
}

function moveFocus(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const rows = [...event.currentTarget.querySelectorAll(".row")];
  event.preventDefault();
  rows[rows.indexOf(document.activeElement) + step]?.focus();
}

/** Scrolls the list and never the page, so that hovering over the image does not move the image. */
function scrollIntoList(row) {
  const list = row.closest(".rows");
  const { top, bottom } = row.getBoundingClientRect();
  const frame = list.getBoundingClientRect();
  if (top < frame.top) list.scrollTop -= frame.top - top;
  if (bottom > frame.bottom) list.scrollTop += bottom - frame.bottom;
}

/** Which classes of a list were not found. */
function makePresence({ body, extra }) {
  if (!extra?.presence) return [];
  const found = new Set(body.results.bboxes.map(({ label }) => label));
  const absent = Object.keys(extra.presence).filter((name) => !found.has(name));
  return absent.length ? [make("p", { className: "absent muted", textContent: `Not found: ${absent.join(", ")}.` })] : [];
}

function makeExtras(extra) {
  if (!extra) return [];
  const raw = make("details", {}, make("summary", { textContent: "Generated text" }), make("code", { className: "raw", textContent: extra.text }));
  if (!extra.truncated) return [raw];
  const notice = "The output was cut off at the token limit. Its last item may be missing or wrong.";
  return [make("p", { className: "notice", textContent: notice }), raw];
}

function makeBarPart({ name, ms }) {
  const part = make("span", { className: `stage-${name}` });
  part.style.flexGrow = String(ms);
  return part;
}

function makeStage({ name, title, ms }) {
  const terms = makeTerm(title, ms);
  terms[0].prepend(make("span", { className: `swatch stage-${name}` }));
  return make("div", {}, ...terms);
}

const makeTerm = (title, ms) => [make("dt", { textContent: title }), make("dd", { textContent: milliseconds(ms) })];

const milliseconds = (ms) => (ms < 10_000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);

function count(shapes) {
  if (!shapes.length) return "nothing found";
  const noun = shapes[0].isFilled ? "outline" : "box";
  if (shapes.length === 1) return `1 ${noun}`;
  return `${shapes.length} ${noun === "box" ? "boxes" : "outlines"}`;
}
