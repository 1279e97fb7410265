/** The shapes of a result, in one form for all tasks. */

import { colourOf } from "./colours.js";

/**
 * @typedef {import("./client.js").Point} Point
 * @typedef {object} Shape
 * @property {Point[]} points corners in pixels of the image; a box has four, clockwise from the top left
 * @property {boolean} isBox whether it is an axis-aligned box
 * @property {boolean} isFilled whether it is a filled outline (a mask) rather than a frame
 * @property {string} label the label in the result; may be empty
 * @property {string} name the label, or the kind of shape and its number if it has none
 * @property {number | null} score null where the answer has no scores
 * @property {string} place its position and size as text
 * @property {string} colour
 * @property {string} ink black or white, whichever is readable on `colour`
 */

/**
 * @param {import("./client.js").Result} result
 * @returns {Shape[]} in the order of the result
 */
export function shapesOf({ body, extra }) {
  const { bboxes = [], quad_boxes = [], polygons = extra?.polygons ?? [] } = body.results;
  const shapes = [
    ...bboxes.map(fromBox),
    ...quad_boxes.map((box, index) => fromQuad(box, extra?.quads?.[index])),
    ...polygons.map(fromPolygon),
  ].map(finish);
  return shapes.map((shape, index) => ({ ...shape, score: extra?.scores?.[index] ?? null }));
}

/**
 * The shape of a part of an answer that is still coming; null for text.
 * @param {import("./client.js").Part} part
 * @returns {Shape | null}
 */
export function shapeOfPart(part) {
  const make = { box: fromBox, quad: (box) => fromQuad(box, part.quad), polygon: fromPolygon }[part.part];
  return make ? { ...finish(make(part.item), part.index), score: null } : null;
}

function fromBox({ x, y, w, h, label }) {
  const [right, bottom] = [x + w, y + h];
  const points = [{ x, y }, { x: right, y }, { x: right, y: bottom }, { x, y: bottom }];
  const place = `x ${Math.round(x)}, y ${Math.round(y)}, ${Math.round(w)} × ${Math.round(h)} px`;
  return { points, label, place, kind: "Box", isBox: true, isFilled: false };
}

function fromQuad(box, quad) {
  const shape = fromBox(box);
  return quad?.length === 4 ? { ...shape, points: quad, kind: "Text", isBox: false } : shape;
}

function fromPolygon({ points, label }) {
  const place = `${points.length} ${points.length === 1 ? "point" : "points"}`;
  return { points, label, place, kind: "Outline", isBox: false, isFilled: true };
}

function finish({ kind, ...shape }, index) {
  return { ...shape, name: shape.label || `${kind} ${index + 1}`, ...colourOf(shape.label, index) };
}
