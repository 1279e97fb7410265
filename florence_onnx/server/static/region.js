/** The region argument, drawn on the image or typed, in thousandths of the image's width and height. */

import { makeSvg } from "./dom.js";
import { InputError } from "./messages.js";

/** @typedef {import("./client.js").Region} Region */

const NUM_BINS = 1000;
const MIN_DRAG_PX = 4;
const NAMES = /** @type {const} */ (["x1", "y1", "x2", "y2"]);
export const WHOLE = { x1: 0, y1: 0, x2: NUM_BINS - 1, y2: NUM_BINS - 1 };

export class RegionTool {
  /**
   * @param {import("./overlay.js").Overlay} overlay
   * @param {Record<"x1" | "y1" | "x2" | "y2", HTMLInputElement>} inputs
   * @param {() => void} onChange
   */
  constructor(overlay, inputs, onChange) {
    this.overlay = overlay;
    this.inputs = inputs;
    this.onChange = onChange;
    this.isEnabled = false;
    this.drag = null;
    this.frame = makeSvg("g", { class: "region" }, makeSvg("rect", { class: "halo" }), makeSvg("rect", { class: "line" }));
    overlay.svg.append(this.frame);
    for (const name of NAMES) inputs[name].addEventListener("input", () => this.update());
    this.listen(overlay.svg);
    this.update();
  }

  /** @param {boolean} isEnabled whether the task needs a region */
  enable(isEnabled) {
    this.isEnabled = isEnabled;
    this.overlay.svg.classList.toggle("is-drawing", isEnabled);
    this.update();
  }

  /** @param {Region | null} region */
  set(region) {
    for (const name of NAMES) this.inputs[name].value = region ? String(region[name]) : "";
    this.update();
  }

  /**
   * @returns {Region}
   * @throws {InputError} the region is missing or invalid
   */
  read() {
    const texts = NAMES.map((name) => this.inputs[name].value);
    if (NAMES.every((name) => isBlank(this.inputs[name]))) {
      throw new InputError("Draw a region on the image first, or type its four edges.", "region");
    }
    if (!texts.every((text) => /^\d{1,3}$/.test(text))) {
      throw new InputError("Each edge of the region must be a whole number from 0 to 999.", "region");
    }
    const [x1, y1, x2, y2] = texts.map(Number);
    if (x1 > x2 || y1 > y2) {
      throw new InputError("The region is inverted: left must not exceed right, and top must not exceed bottom.", "region");
    }
    return { x1, y1, x2, y2 };
  }

  /** @returns {Region | null} the region, or null if it is missing or invalid */
  get value() {
    try {
      return this.read();
    } catch (error) {
      if (error instanceof InputError) return null;
      throw error;
    }
  }

  update() {
    const region = this.value;
    this.frame.toggleAttribute("hidden", !this.isEnabled || !region);
    for (const name of NAMES) this.inputs[name].setAttribute("aria-invalid", String(!region && !isBlank(this.inputs[name])));
    if (region) this.drawFrame(region);
    this.onChange();
  }

  /** A bin is a strip of the image, and the region includes its last bin: hence x2 + 1 and y2 + 1. */
  drawFrame({ x1, y1, x2, y2 }) {
    const { width, height } = this.overlay.size;
    const box = {
      x: (x1 * width) / NUM_BINS,
      y: (y1 * height) / NUM_BINS,
      width: ((x2 + 1 - x1) * width) / NUM_BINS,
      height: ((y2 + 1 - y1) * height) / NUM_BINS,
    };
    for (const rect of this.frame.children) {
      for (const [name, value] of Object.entries(box)) rect.setAttribute(name, String(value));
    }
  }

  listen(svg) {
    svg.addEventListener("pointerdown", (event) => this.start(event));
    svg.addEventListener("pointermove", (event) => this.move(event));
    svg.addEventListener("pointerup", () => this.finish());
    svg.addEventListener("pointercancel", () => this.cancel());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.cancel();
    });
  }

  start(event) {
    if (!this.isEnabled || !event.isPrimary || event.button !== 0) return;
    event.preventDefault();
    event.currentTarget.setPointerCapture(event.pointerId);
    this.drag = { clientX: event.clientX, clientY: event.clientY, previous: this.value };
  }

  move(event) {
    if (!this.drag) return;
    const isTiny = Math.max(Math.abs(event.clientX - this.drag.clientX), Math.abs(event.clientY - this.drag.clientY)) < MIN_DRAG_PX;
    if (!isTiny) this.set(this.between(this.drag, event));
  }

  finish() {
    this.drag = null;
  }

  cancel() {
    if (!this.drag) return;
    this.set(this.drag.previous);
    this.drag = null;
  }

  /** @returns {Region} */
  between(start, end) {
    const [a, b] = [this.toBins(start), this.toBins(end)];
    return { x1: Math.min(a.x, b.x), y1: Math.min(a.y, b.y), x2: Math.max(a.x, b.x), y2: Math.max(a.y, b.y) };
  }

  toBins(event) {
    const { x, y } = this.overlay.toImage(event);
    return { x: toBin(x, this.overlay.size.width), y: toBin(y, this.overlay.size.height) };
  }
}

const toBin = (pixel, size) => Math.max(0, Math.min(NUM_BINS - 1, Math.floor((pixel * NUM_BINS) / size)));

/** The value of a number input is also empty if the text in it is not a number. */
const isBlank = (input) => input.value === "" && !input.validity.badInput;
