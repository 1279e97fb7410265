/** Draws the shapes of a result over the image, in an SVG whose units are the image's pixels. */

import { makeSvg } from "./dom.js";

/** @typedef {import("./shapes.js").Shape} Shape */

const MAX_TAG_LETTERS = 32;
const TAG = { height: 20, padding: 6, baseline: 14.5 };

export class Overlay {
  /**
   * @param {SVGSVGElement} svg
   * @param {{onHover: (index: number | null) => void, onPick: (index: number) => void}} listeners
   */
  constructor(svg, { onHover, onPick }) {
    this.svg = svg;
    this.onHover = onHover;
    this.onPick = onPick;
    this.size = { width: 1, height: 1 };
    this.shapes = /** @type {Shape[]} */ ([]);
    this.outlines = makeSvg("g");
    this.tags = makeSvg("g", { class: "tags" });
    svg.append(this.outlines, this.tags);
    new ResizeObserver(() => this.placeTags()).observe(svg);
  }

  /** @param {{width: number, height: number}} size of the image in pixels */
  setSize({ width, height }) {
    this.size = { width, height };
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  }

  /** @param {Shape[]} shapes */
  show(shapes) {
    this.shapes = shapes;
    this.highlight(null);
    // small shapes are drawn last, so that none is covered by a larger one
    const order = [...shapes.keys()].sort((a, b) => area(shapes[b]) - area(shapes[a]));
    this.outlines.replaceChildren(...order.map((index) => this.makeOutline(index)));
    this.tags.replaceChildren(...order.filter((index) => shapes[index].label).map((index) => this.makeTag(index)));
    this.placeTags();
  }

  /** @param {number | null} index */
  highlight(index) {
    this.svg.classList.toggle("has-active", index !== null);
    for (const element of this.svg.querySelectorAll("[data-index]")) {
      element.classList.toggle("is-active", Number(element.dataset.index) === index);
    }
  }

  /**
   * Converts the position of a pointer to pixels of the image.
   * @param {{clientX: number, clientY: number}} event
   * @returns {{x: number, y: number}} may lie outside the image
   */
  toImage(event) {
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM()?.inverse());
  }

  makeOutline(index) {
    const shape = this.shapes[index];
    const className = shape.isFilled ? "shape is-filled" : "shape";
    const group = makeSvg("g", { class: className, "data-index": index, stroke: shape.colour, fill: shape.colour });
    group.append(makeGeometry(shape, "halo"), makeGeometry(shape, "line"));
    group.addEventListener("pointerenter", () => this.onHover(index));
    group.addEventListener("pointerleave", () => this.onHover(null));
    group.addEventListener("click", () => this.onPick(index));
    return group;
  }

  makeTag(index) {
    const { label, colour, ink } = this.shapes[index];
    const text = makeSvg("text", { x: TAG.padding, y: TAG.baseline, fill: ink });
    text.textContent = label.length > MAX_TAG_LETTERS ? `${label.slice(0, MAX_TAG_LETTERS - 1)}…` : label;
    return makeSvg("g", { class: "tag", "data-index": index }, makeSvg("rect", { height: TAG.height, rx: 4, fill: colour }), text);
  }

  /** Places the labels, which have a fixed size on the screen; those of small shapes are placed first. */
  placeTags() {
    const scale = this.svg.getScreenCTM()?.a;
    if (!scale) return;
    const taken = [];
    for (const tag of [...this.tags.children].reverse()) {
      const width = tag.querySelector("text").getComputedTextLength() + 2 * TAG.padding;
      tag.querySelector("rect").setAttribute("width", width);
      const box = this.findPlace(this.shapes[tag.dataset.index], width / scale, TAG.height / scale, taken);
      tag.setAttribute("transform", `translate(${box.x} ${box.y}) scale(${1 / scale})`);
      taken.push(box);
    }
  }

  /** Finds the first free place: above the shape, inside at its top, below it, inside at its bottom; always inside the image. */
  findPlace(shape, width, height, taken) {
    const { left, top, bottom } = bounds(shape);
    const places = [top - height, top, bottom, bottom - height].map((y) => ({
      x: clamp(left, 0, this.size.width - width),
      y: clamp(y, 0, this.size.height - height),
      width,
      height,
    }));
    return places.find((place) => !taken.some((other) => overlap(place, other))) ?? places[0];
  }
}

/** Axis-aligned boxes become a `rect`, all other shapes a `polygon`. */
function makeGeometry({ points, isBox }, className) {
  if (!isBox) return makeSvg("polygon", { class: className, points: points.map(({ x, y }) => `${x},${y}`).join(" ") });
  const [topLeft, , bottomRight] = points;
  const [width, height] = [bottomRight.x - topLeft.x, bottomRight.y - topLeft.y];
  return makeSvg("rect", { class: className, x: topLeft.x, y: topLeft.y, width, height });
}

function bounds({ points }) {
  const [xs, ys] = [points.map((point) => point.x), points.map((point) => point.y)];
  return { left: Math.min(...xs), top: Math.min(...ys), right: Math.max(...xs), bottom: Math.max(...ys) };
}

function area(shape) {
  const { left, top, right, bottom } = bounds(shape);
  return (right - left) * (bottom - top);
}

const clamp = (value, low, high) => Math.max(low, Math.min(value, high));

const overlap = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
