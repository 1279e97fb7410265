/** Formats and colours fal's JSON. */

import { make } from "./dom.js";

const MAX_DATA_URI = 64;
const TOKEN = /("(?:[^"\\]|\\.)*")(\s*:)?|\b(?:true|false|null)\b|-?\d[\d.eE+-]*/g;

/**
 * Writes a value as indented JSON; long `data:` URIs are shortened.
 * @param {any} value
 */
export const write = (value) => JSON.stringify(value, (_, part) => shorten(part), 2);

const shorten = (part) =>
  typeof part === "string" && part.startsWith("data:") && part.length > MAX_DATA_URI ? `${part.slice(0, MAX_DATA_URI)}…` : part;

/**
 * Wraps the strings, names and literals of JSON in spans for the style sheet.
 * @param {string} json
 * @returns {(Node | string)[]}
 */
export function colour(json) {
  const parts = [];
  let end = 0;
  for (const match of json.matchAll(TOKEN)) {
    parts.push(json.slice(end, match.index), make("span", { className: kindOf(match), textContent: match[1] ?? match[0] }), match[2] ?? "");
    end = match.index + match[0].length;
  }
  return [...parts, json.slice(end)];
}

function kindOf([, string, colon]) {
  if (!string) return "literal";
  return colon ? "name" : "string";
}
