/** What the page calls the tasks, and what it says about them. */

import { make } from "./dom.js";

/** @typedef {import("./client.js").Task} Task */

const GROUPS = ["Find", "Outline", "Read", "Describe", "Ask about a region"];

const HINTS = {
  "object-detection": "Boxes of the objects, labelled with their category.",
  "dense-region-caption": "Boxes of the objects, labelled with a short description.",
  "region-proposal": "Boxes of whatever stands out, without labels.",
  "open-vocabulary-detection": "Boxes of the one thing that the text names.",
  "caption-to-phrase-grounding": "Boxes of the things that a caption mentions.",
  "ocr-with-region": "Each line of text with its four corners.",
  "referring-expression-segmentation": "The outline of what the text refers to.",
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
  "open-vocabulary-detection": "One thing, such as “red circle”. All of the text is one name.",
  "caption-to-phrase-grounding": "A sentence, such as “A red circle beside a yellow star.”",
  "referring-expression-segmentation": "One thing, such as “the red circle”.",
};

/**
 * Fills the list of tasks.
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
export const hintOf = ({ slug, token }) => `${HINTS[slug] ?? "A task of this model."} Token\u00a0${token}.`;

/** @param {Task} task */
export const textHintOf = ({ slug }) => TEXT_HINTS[slug] ?? "What the task asks for.";

/** @param {string} slug */
export const titleOf = (slug) => capitalize(slug.replaceAll("-", " ").replace(/\bocr\b/, "OCR"));

const makeOption = ({ slug }) => make("option", { value: slug, textContent: titleOf(slug) });

const capitalize = (text) => text[0].toUpperCase() + text.slice(1);

function groupOf({ slug, needs, answer }) {
  if (needs === "region") return "Ask about a region";
  if (answer === "boxes") return "Find";
  if (answer === "polygons") return "Outline";
  return answer === "quads" || slug === "ocr" ? "Read" : "Describe";
}
