/** Titles, groups and descriptions of the tasks. */

import { make } from "./dom.js";

/** @typedef {import("./client.js").Task} Task */

/** The task that is asked for each class of a list. */
const FOR_CLASSES = "open-vocabulary-detection";

/**
 * The tasks of a server, and the one to detect a list of classes.
 * @param {Task[]} tasks
 * @returns {(Task & {endpoint?: string})[]}
 */
export function withClassList(tasks) {
  return tasks.flatMap((task) =>
    task.slug === FOR_CLASSES ? [task, { ...task, slug: "detect-a-list", endpoint: FOR_CLASSES, needs: "classes" }] : [task],
  );
}

const OWN = "Of this model";
const GROUPS = ["Detection", "Segmentation", "OCR", "Captioning", "Region", OWN];

const HINTS = {
  "object-detection": "Boxes around objects, labelled with their category.",
  "dense-region-caption": "Boxes around objects, labelled with a short description.",
  "region-proposal": "Boxes around anything that stands out, without labels.",
  "open-vocabulary-detection": "Boxes around the thing that the text names.",
  "detect-a-list": "Boxes around the things of a list, and which of them are not there.",
  "caption-to-phrase-grounding": "Boxes around the things that the text mentions.",
  "ocr-with-region": "The lines of text in the image, each with its four corners.",
  "referring-expression-segmentation": "The outline of the thing that the text refers to.",
  "region-to-segmentation": "The outline of the object in a region.",
  "caption": "One sentence about the image.",
  "detailed-caption": "A few sentences about the image.",
  "more-detailed-caption": "A paragraph about the image.",
  "ocr": "The text in the image.",
  "region-to-category": "The category of the object in a region.",
  "region-to-description": "A description of the object in a region.",
  "region-to-ocr": "The text in a region.",
};

const TEXT_HINTS = {
  "detect-a-list": "One thing a line, or with commas between them, such as “red circle, yellow star, square”.",
  "open-vocabulary-detection": "One thing, such as “red circle”: the whole text is taken as its name.",
  "caption-to-phrase-grounding": "A sentence, such as “A red circle beside a yellow star.”",
  "referring-expression-segmentation": "One thing, such as “the red circle”.",
};

/**
 * Fills the drop-down list of tasks.
 * @param {HTMLSelectElement} select
 * @param {Task[]} tasks
 */
export function fillTasks(select, tasks) {
  for (const label of GROUPS) {
    const options = tasks.filter((task) => groupOf(task) === label).map(makeOption);
    if (options.length) select.append(make("optgroup", { label }, ...options));
  }
}

/** @param {Task} task */
export const hintOf = ({ slug, token, description }) =>
  `${(HINTS[slug] ?? description) || "A task of this model."} Task token\u00a0${token}.`;

/** @param {Task} task */
export const textHintOf = ({ slug }) => TEXT_HINTS[slug] ?? "The text for this task.";

/** @param {string} slug */
export const titleOf = (slug) => capitalize(slug.replaceAll("-", " ").replace(/\bocr\b/, "OCR"));

const makeOption = ({ slug }) => make("option", { value: slug, textContent: titleOf(slug) });

const capitalize = (text) => text[0].toUpperCase() + text.slice(1);

function groupOf({ slug, needs, output, is_own }) {
  if (is_own) return OWN;
  if (needs === "region") return "Region";
  if (output === "boxes") return "Detection";
  if (output === "polygons") return "Segmentation";
  return output === "quads" || slug === "ocr" ? "OCR" : "Captioning";
}
