/** The playground: runs one task on one image and shows the result. */

import { highlightRow, showResult, showTimings, summarize } from "./result.js";
import { loadConfig, runTask } from "./client.js";
import { byId, copy, make } from "./dom.js";
import * as json from "./json.js";
import { explain, InputError } from "./messages.js";
import { Overlay } from "./overlay.js";
import * as images from "./image.js";
import { RegionTool, WHOLE } from "./region.js";
import { shapeOfPart, shapesOf } from "./shapes.js";
import { writeSnippets } from "./snippets.js";
import { fillTabs } from "./tabs.js";
import { fillTasks, hintOf, textHintOf, titleOf, withClassList } from "./tasks.js";

const DEMO_NOTE = "The demo model only knows drawn shapes and words: pick a sample.";
const COPIED_FOR_MS = 1600;

/** @type {import("./client.js").Config} */
let config;
/** @type {images.ChosenImage | null} */
let image = null;
/** @type {import("./client.js").Result | null} */
let result = null;
/** @type {AbortController | null} the request in flight */
let running = null;
let isBusy = false;
/** Counts the images that were chosen, so that one that loads slowly does not replace a later one. */
let numChoices = 0;
/** @type {Promise<void>} settles when the last chosen image is loaded; a request waits for it */
let choosing = Promise.resolve();
let language = "python";
let hovered = null;
let pinned = null;

const overlay = new Overlay(byId("overlay"), { onHover: hover, onPick: pick });
const region = new RegionTool(
  overlay,
  { x1: byId("x1"), y1: byId("y1"), x2: byId("x2"), y2: byId("y2") },
  () => config && updateCode(),
);

start();

async function start() {
  try {
    config = await loadConfig();
    config.tasks = withClassList(config.tasks);
  } catch (error) {
    showProblem(explain(error, { key: "", maxBytes: 0 }));
    return;
  }
  const { model, provider, precision } = config;
  const facts = [model, provider?.replace("ExecutionProvider", ""), precision].filter(Boolean);
  byId("served").replaceChildren(...facts.map((text) => make("span", { textContent: text })));
  if (model === "demo") byId("served").append(make("small", { textContent: DEMO_NOTE }));
  byId("key-field").hidden = !config.auth;
  fillTasks(byId("task"), config.tasks);
  byId("samples").append(...config.samples.map(makeSample));
  fillTabs(byId("languages"), byId("code"), snippets(), (id) => {
    language = id;
    updateCode();
  });
  listen();
  updateTask();
  if (config.samples.length && numChoices === 0) chooseSample(config.samples[0]);
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    run();
  });
  byId("cancel").addEventListener("click", () => running?.abort());
  byId("task").addEventListener("change", updateTask);
  byId("text").addEventListener("input", updateCode);
  byId("cut").addEventListener("input", showShapes);
  byId("region-all").addEventListener("click", () => region.set(WHOLE));
  byId("region-clear").addEventListener("click", () => region.set(null));
  byId("show-labels").addEventListener("change", (event) => overlay.svg.classList.toggle("without-tags", !event.target.checked));
  byId("copy-json").addEventListener("click", (event) => copyFrom(event.currentTarget, JSON.stringify(result?.body, null, 2)));
  byId("copy-code").addEventListener("click", (event) => copyFrom(event.currentTarget, byId("code").textContent));
  listenForFiles();
}

function listenForFiles() {
  byId("file").addEventListener("change", (event) => {
    chooseFile(event.target.files[0]);
    event.target.value = ""; // the same file can be chosen again
  });
  document.addEventListener("paste", (event) => chooseFile(event.clipboardData?.files[0]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    byId("stage").classList.add("is-dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) byId("stage").classList.remove("is-dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    byId("stage").classList.remove("is-dropping");
    chooseFile(event.dataTransfer?.files[0]);
  });
}

// --- the image

function makeSample(sample) {
  const thumbnail = make("img", { src: sample.url, alt: "", loading: "lazy", width: sample.width, height: sample.height });
  const title = `Sample ${sample.name}`;
  return make("button", { type: "button", className: "sample", title, "aria-label": title, "aria-pressed": "false", data: { name: sample.name }, onclick: () => chooseSample(sample) }, thumbnail);
}

/** @param {File | undefined} file */
function chooseFile(file) {
  if (file) choosing = choose(() => images.fromFile(file, config.max_bytes), null);
}

function chooseSample(sample) {
  choosing = choose(() => images.fromSample(sample), sample.name);
}

/**
 * Loads another image; if that fails, the current one stays.
 * @param {() => Promise<images.ChosenImage>} load
 * @param {string | null} sampleName
 */
async function choose(load, sampleName) {
  const choice = ++numChoices;
  try {
    const loaded = await load();
    if (choice === numChoices) showImage(loaded, sampleName);
    else images.release(loaded);
  } catch (error) {
    if (choice === numChoices) showProblem(explain(error, context()));
  }
}

function showImage(loaded, sampleName) {
  running?.abort();
  if (image) images.release(image);
  image = loaded;
  const size = `${image.width} × ${image.height}`;
  Object.assign(byId("image"), { src: image.url, alt: `${image.name}, ${size} pixels`, hidden: false });
  byId("image-name").textContent = `${image.name} · ${size}`;
  byId("stage-empty").hidden = true;
  overlay.svg.toggleAttribute("hidden", false);
  overlay.setSize(image);
  for (const button of byId("samples").children) button.setAttribute("aria-pressed", String(button.dataset.name === sampleName));
  clearResult();
  region.set(null);
  showProblem(null);
  say(`${image.name} is ready.`);
}

// --- the input

const currentTask = () => config.tasks.find((task) => task.slug === byId("task").value) ?? config.tasks[0];

const context = () => ({ key: byId("key").value, maxBytes: config.max_bytes });

function updateTask() {
  const task = currentTask();
  byId("task-hint").textContent = hintOf(task);
  byId("text-hint").textContent = textHintOf(task);
  byId("text-field").hidden = !takes(task, "text") && !takes(task, "classes");
  byId("text").rows = takes(task, "classes") ? 4 : 2;
  document.querySelector("label[for=text]").textContent = takes(task, "classes") ? "Classes" : "Text";
  byId("region-field").hidden = !takes(task, "region");
  region.enable(takes(task, "region"));
  showProblem(null);
  updateCode();
}

/** Whether a task takes an input, by the words of its `needs`. */
const takes = (task, input) => task.needs.split("+").includes(input);

/** The names of the classes, one a line or with commas between them. */
const readClasses = () => byId("text").value.split(/[\n,]/).map((name) => name.trim()).filter(Boolean);

/** @returns {{text_input?: string, classes?: string[], region?: import("./client.js").Region}} the task's arguments besides the image */
function readInput(task) {
  if (!image) throw new InputError("Choose an image first: drop or paste one, choose a file, or pick a sample.", "image");
  const input = {};
  if (takes(task, "text")) {
    input.text_input = byId("text").value;
    if (!input.text_input.trim()) throw new InputError("This task needs a text. Enter one first.", "text");
  }
  if (takes(task, "classes")) {
    input.classes = readClasses();
    if (!input.classes.length) throw new InputError("This task needs at least one class. Enter one first.", "text");
  }
  if (takes(task, "region")) input.region = region.read();
  return input;
}

async function run() {
  if (isBusy) return;
  const task = currentTask();
  setBusy(true);
  try {
    await choosing;
    showProblem(null);
    say(`Running: ${titleOf(task.slug)} …`);
    running = new AbortController();
    const { signal } = running;
    const input = readInput(task);
    const image_url = await images.toDataUri(image);
    const parts = [];
    const onPart = (part) => receivePart(part, parts);
    const endpoint = `${config.prefix}/${task.endpoint ?? task.slug}`;
    receive(task, await runTask(endpoint, { image_url, ...input, scores: true }, { key: byId("key").value, signal, onPart }));
  } catch (error) {
    say(error.name === "AbortError" ? "Cancelled." : "");
    if (error.name !== "AbortError") showProblem(explain(error, context()));
    showShapes(); // those of the last result, if parts of another answer have come
  } finally {
    running = null;
    setBusy(false);
  }
}

function setBusy(isNowBusy) {
  isBusy = isNowBusy;
  byId("run").setAttribute("aria-disabled", String(isBusy));
  byId("run").classList.toggle("is-busy", isBusy);
  byId("cancel").hidden = !isBusy;
}

// --- the result

/** Draws what is complete of an answer that is still coming. */
function receivePart(part, parts) {
  const shape = shapeOfPart(part);
  if (!shape) return;
  parts.push(shape);
  pinned = hovered = null;
  overlay.show(parts);
  say(`${parts.length} found so far …`);
}

/** Draws the shapes of the result whose score is high enough, and lists them. */
function showShapes() {
  if (!result) {
    overlay.show([]);
    return;
  }
  const least = Number(byId("cut").value);
  const all = shapesOf(result);
  const shapes = all.filter(({ score }) => score === null || score >= least);
  pinned = hovered = null;
  overlay.show(shapes);
  showResult(byId("result"), result, shapes, { onHover: hover, onPick: pick });
  byId("cut-value").textContent = `${least.toFixed(3)}: ${shapes.length} of ${all.length}`;
}

/** Sets the slider to 0, from 0 to the highest score. */
function resetCut(shapes) {
  const scores = shapes.map(({ score }) => score).filter((score) => score !== null);
  byId("cut-field").hidden = !scores.length;
  Object.assign(byId("cut"), { max: String(Math.max(0, ...scores)), value: "0" });
}

function receive(task, received) {
  result = received;
  const shapes = shapesOf(result);
  resetCut(shapes);
  showShapes();
  showTimings(byId("timings"), result);
  byId("result-task").textContent = titleOf(task.slug);
  byId("json").replaceChildren(...json.colour(json.write(result.body)));
  byId("copy-json").disabled = false;
  say(summarize(result, shapes));
}

function clearResult() {
  result = null;
  pinned = hovered = null;
  overlay.show([]);
  byId("cut-field").hidden = true;
  byId("result").replaceChildren(make("p", { className: "muted", textContent: "No result for this image yet." }));
  byId("timings").replaceChildren();
  byId("result-task").textContent = "";
  byId("json").replaceChildren(make("span", { className: "muted", textContent: "The JSON of the result will appear here." }));
  byId("copy-json").disabled = true;
}

function hover(index) {
  hovered = index;
  updateHighlight();
}

function pick(index) {
  pinned = pinned === index ? null : index;
  updateHighlight();
}

function updateHighlight() {
  const active = hovered ?? pinned;
  overlay.highlight(active);
  highlightRow(byId("result"), active, pinned);
}

// --- messages and code

/** @param {import("./messages.js").Problem | null} problem */
function showProblem(problem) {
  const lines = problem ? [make("p", { textContent: problem.message })] : [];
  if (problem?.detail) lines.push(make("p", { className: "detail", textContent: `The server said: ${problem.detail}` }));
  byId("problem").replaceChildren(...lines);
  const field = { text: "text", region: "x1", key: "key" }[problem?.field];
  // on a touch screen, focus would open the keyboard over the image
  if (field && !byId(field).closest("[hidden]") && matchMedia("(pointer: fine)").matches) byId(field).focus();
}

const say = (text) => (byId("status").textContent = text);

function snippets() {
  const task = currentTask();
  return writeSnippets({
    server: new URL(".", location.href).href,
    endpoint: `${config.prefix}/${task.endpoint ?? task.slug}`,
    auth: config.auth,
    model: config.model,
    fileName: image?.name ?? "image.png",
    contentType: image?.blob.type || "image/png",
    text: takes(task, "text") ? byId("text").value || "red circle" : undefined,
    classes: takes(task, "classes") ? classesOr(["red circle", "yellow star"]) : undefined,
    region: takes(task, "region") ? region.value : undefined,
  });
}

/** @param {string[]} example for an empty field */
function classesOr(example) {
  const classes = readClasses();
  return classes.length ? classes : example;
}

function updateCode() {
  byId("code").textContent = snippets().find(({ id }) => id === language)?.code ?? "";
}

async function copyFrom(button, text) {
  const isCopied = await copy(text);
  say(isCopied ? "Copied." : "The browser blocked copying. Select the text and copy it manually.");
  button.classList.toggle("is-copied", isCopied);
  setTimeout(() => button.classList.remove("is-copied"), COPIED_FOR_MS);
}
