// A mask that is painted: what is opaque is repainted. Lines, rectangles, inverted, cleared, undone. Knows no pointers.

import { pictureOf } from "./dom.js";

const LONGEST = 2048; // pixels of a side that are painted on; the mask is scaled to its picture's size when it is sent
const KEPT_STEPS = 100, KEPT_BYTES = 96e6; // of what can be undone
const TINT = "#d6218f";

const blank = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

export class Mask extends EventTarget {
  #undone = [];
  #done = []; // {x, y, before, after}: parts of the canvas
  #before = null; // the canvas as it was when a step began
  #touched = null; // the box that the step has changed
  #share = 0;

  /** A mask of a picture of so many pixels. */
  constructor(width, height) {
    super();
    Object.assign(this, { width, height });
    this.scale = Math.min(1, LONGEST / Math.max(width, height));
    this.canvas = blank(Math.max(1, Math.round(width * this.scale)), Math.max(1, Math.round(height * this.scale)));
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.context.lineCap = this.context.lineJoin = "round";
  }

  /** The mask in a file that is white where the picture is repainted. */
  static async from(file) {
    const picture = await pictureOf(file), mask = new Mask(picture.width, picture.height);
    const { context, canvas: { width, height } } = mask;
    context.drawImage(picture, 0, 0, width, height);
    const found = context.getImageData(0, 0, width, height), { data } = found;
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(TINT.slice(at, at + 2), 16));
    for (let at = 0; at < data.length; at += 4) {
      data[at + 3] = data[at];
      [data[at], data[at + 1], data[at + 2]] = [red, green, blue];
    }
    context.putImageData(found, 0, 0);
    mask.#changed();
    return mask;
  }

  // steps; places and sizes in pixels of the picture

  /** Begins a step of lines. */
  begin() {
    const { width, height } = this.canvas;
    this.#before = blank(width, height);
    this.#before.getContext("2d").drawImage(this.canvas, 0, 0);
    this.#touched = null;
  }

  line(from, to, size, { erase = false } = {}) {
    const { context, scale } = this;
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.strokeStyle = context.fillStyle = TINT;
    context.lineWidth = Math.max(1, size * scale);
    context.beginPath();
    if (from.x === to.x && from.y === to.y) { // a line without length is not drawn
      context.arc(to.x * scale, to.y * scale, context.lineWidth / 2, 0, 2 * Math.PI);
      context.fill();
    } else {
      context.moveTo(from.x * scale, from.y * scale);
      context.lineTo(to.x * scale, to.y * scale);
      context.stroke();
    }
    const reach = (size / 2) * scale + 2;
    this.#touch(Math.min(from.x, to.x) * scale - reach, Math.min(from.y, to.y) * scale - reach,
      Math.max(from.x, to.x) * scale + reach, Math.max(from.y, to.y) * scale + reach);
  }

  end() {
    const before = this.#before, box = this.#touched;
    this.#before = null;
    if (!before || !box) return;
    const [x, y, width, height] = [box[0], box[1], box[2] - box[0], box[3] - box[1]];
    this.#done.push({
      x, y, before: before.getContext("2d").getImageData(x, y, width, height), after: this.context.getImageData(x, y, width, height),
    });
    this.#undone = [];
    const bytes = () => this.#done.reduce((sum, { before: { data } }) => sum + 2 * data.length, 0);
    while (this.#done.length > KEPT_STEPS || (this.#done.length > 1 && bytes() > KEPT_BYTES)) this.#done.shift();
    this.#changed();
  }

  /** Takes back what a step has done, which is none then. */
  cancel() {
    if (!this.#before) return;
    this.context.globalCompositeOperation = "copy";
    this.context.drawImage(this.#before, 0, 0);
    this.#before = null;
  }

  rectangle(a, b, { erase = false } = {}) {
    const { scale } = this;
    const [left, right] = [a.x, b.x].sort((p, q) => p - q).map((at) => Math.round(at * scale));
    const [top, bottom] = [a.y, b.y].sort((p, q) => p - q).map((at) => Math.round(at * scale));
    this.#fill(erase ? "destination-out" : "source-over", left, top, Math.max(1, right - left), Math.max(1, bottom - top));
  }

  invert() {
    this.#fill("xor", 0, 0, this.canvas.width, this.canvas.height);
  }

  clear() {
    this.#fill("destination-out", 0, 0, this.canvas.width, this.canvas.height);
  }

  #fill(operation, left, top, width, height) {
    this.begin();
    this.context.globalCompositeOperation = operation;
    this.context.fillStyle = TINT;
    this.context.fillRect(left, top, width, height);
    this.#touch(left, top, left + width, top + height);
    this.end();
  }

  #touch(left, top, right, bottom) {
    const { width, height } = this.canvas;
    const box = [Math.max(0, Math.floor(left)), Math.max(0, Math.floor(top)), Math.min(width, Math.ceil(right)), Math.min(height, Math.ceil(bottom))];
    if (box[2] <= box[0] || box[3] <= box[1]) return; // beside the picture
    const was = this.#touched ?? box;
    this.#touched = [Math.min(was[0], box[0]), Math.min(was[1], box[1]), Math.max(was[2], box[2]), Math.max(was[3], box[3])];
  }

  get canUndo() {
    return this.#done.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  undo() {
    this.#step(this.#done, this.#undone, "before");
  }

  redo() {
    this.#step(this.#undone, this.#done, "after");
  }

  #step(from, to, side) {
    const step = from.pop();
    if (!step) return;
    this.context.putImageData(step[side], step.x, step.y);
    to.push(step);
    this.#changed();
  }

  // what it is

  #changed() {
    const { data } = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    let painted = 0;
    for (let at = 3; at < data.length; at += 4) if (data[at]) painted += 1;
    this.#share = painted / (data.length / 4);
    this.dispatchEvent(new Event("change"));
  }

  /** The share of the picture that is painted; 0 only if nothing is. */
  get share() {
    return this.#share;
  }

  /** Whether a place is painted. */
  has({ x, y }) {
    const at = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value * this.scale)));
    return this.context.getImageData(at(x, this.canvas.width), at(y, this.canvas.height), 1, 1).data[3] > 127;
  }

  /** A PNG of the picture's size: white where it is repainted, black elsewhere. */
  file() {
    const whole = blank(this.width, this.height), context = whole.getContext("2d");
    context.drawImage(this.canvas, 0, 0, this.width, this.height);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, this.width, this.height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.width, this.height);
    return new Promise((resolve, reject) => {
      whole.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The browser cannot make a picture of the mask; it may be too large."))), "image/png");
    });
  }
}
