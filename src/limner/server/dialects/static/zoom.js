// What of a picture a stage shows: wheel, two fingers and calls zoom and move it. One finger, or the mouse, is a gesture
// of the owner's. Places are in pixels of the picture; (0, 0) is its corner at the left and top.

const MOST = 40; // stage pixels a picture pixel
const middle = (a, b) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });
const distance = (a, b) => Math.max(1, Math.hypot(a.x - b.x, a.y - b.y));

export class Zoom {
  scale = 1; // stage pixels a picture pixel
  #left = 0; // of the picture's corner, in stage pixels
  #top = 0;
  #box = [0, 0, 1, 1]; // what there is to see
  #fitted = true;
  #pointers = new Map(); // id to where it is, in stage pixels
  #pinch = null;
  #pressed = null; // the gesture of one pointer: {move, end, cancel}

  /**
   * `press(place, event)` begins a gesture of one pointer and gives {move(place, event), end(), cancel()}; null moves the
   * picture. `changed()` puts things where they are now. `view(event)` is the element that is looked through.
   */
  constructor(stage, { changed, press = () => null, view = () => stage }) {
    Object.assign(this, { stage, changed, press, view });
    stage.addEventListener("pointerdown", (event) => this.#down(event));
    stage.addEventListener("pointermove", (event) => this.#moved(event));
    for (const kind of ["pointerup", "pointercancel"]) stage.addEventListener(kind, (event) => this.#up(event));
    stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.by(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), this.#at(event));
    }, { passive: false });
    new ResizeObserver(() => (this.#fitted ? this.fit() : this.by(1))).observe(stage);
  }

  /** What there is to see: left, top, right, bottom. */
  show(box) {
    this.#box = box;
    this.fit();
  }

  fit() {
    const [left, top, right, bottom] = this.#box, { width, height } = this.#room;
    if (!width || !height) return;
    this.scale = Math.min(width / (right - left), height / (bottom - top), MOST);
    this.#put(0, 0);
    this.#fitted = true;
  }

  get zoomed() {
    return !this.#fitted;
  }

  /** Zooms by a factor; what is at `at` (stage pixels, the middle if left out) stays there. */
  by(factor, at = { x: this.#room.width / 2, y: this.#room.height / 2 }) {
    const before = this.scale, { width, height } = this.#room, [left, top, right, bottom] = this.#box;
    const least = Math.min(width / (right - left), height / (bottom - top), MOST);
    this.scale = Math.min(MOST, Math.max(least, before * factor));
    const grown = this.scale / before;
    this.#put(at.x - (at.x - this.#left) * grown, at.y - (at.y - this.#top) * grown);
    this.#fitted = this.scale <= least;
  }

  /** Gives up the gesture that a pointer has begun, if any, and says whether there was one. What the pointer does then is nothing. */
  cancel() {
    const begun = this.#pressed?.cancel;
    if (!begun) return false;
    begun();
    this.#pressed = {};
    return true;
  }

  /** Shows the picture pixel by pixel of the screen. */
  exact() {
    this.by(1 / (this.scale * devicePixelRatio));
  }

  /** Moves the picture by stage pixels. */
  move(right, down) {
    this.#put(this.#left + right, this.#top + down);
  }

  /** Moves the picture, if need be, so that a place of it is seen. */
  reveal({ x, y }) {
    const { width, height } = this.#room, edge = 24;
    const over = (at, room) => (at < edge ? edge - at : at > room - edge ? room - edge - at : 0);
    this.move(over(this.#left + x * this.scale, width), over(this.#top + y * this.scale, height));
  }

  /** Puts an element at a box of the picture. */
  place(element, [left, top, right, bottom]) {
    const { scale } = this;
    Object.assign(element.style, {
      left: `${this.#left + left * scale}px`, top: `${this.#top + top * scale}px`,
      width: `${(right - left) * scale}px`, height: `${(bottom - top) * scale}px`,
      imageRendering: scale * devicePixelRatio >= 3 ? "pixelated" : "auto",
    });
  }

  get #room() {
    const { clientWidth: width, clientHeight: height } = this.view();
    return { width, height };
  }

  #put(x, y) {
    const [left, top, right, bottom] = this.#box, { width, height } = this.#room, { scale } = this;
    const kept = (at, low, high, room) => {
      const size = (high - low) * scale;
      if (size <= room) return (room - size) / 2 - low * scale; // in the middle
      return Math.min(-low * scale, Math.max(room - high * scale, at));
    };
    this.#left = kept(x, left, right, width);
    this.#top = kept(y, top, bottom, height);
    this.changed();
  }

  #at(event) {
    const box = this.view(event).getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** The place of the picture that an event is at. */
  placeOf(event) {
    const { x, y } = this.#at(event);
    return { x: (x - this.#left) / this.scale, y: (y - this.#top) / this.scale };
  }

  #down(event) {
    if (event.target.closest("button, input, select")) return;
    this.#pointers.set(event.pointerId, this.#at(event));
    this.stage.setPointerCapture(event.pointerId);
    if (this.#pointers.size === 1) {
      this.#pressed = event.button === 1 ? null : this.press(this.placeOf(event), event);
      if (event.button === 1) event.preventDefault(); // no scrolling by itself
    } else {
      this.cancel();
      this.#pressed = {}; // what is left of two fingers does nothing
      const [a, b] = this.#pointers.values();
      this.#pinch = { apart: distance(a, b), at: middle(a, b) };
    }
  }

  #moved(event) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return;
    const now = this.#at(event);
    this.#pointers.set(event.pointerId, now);
    if (this.#pinch && this.#pointers.size >= 2) {
      const [a, b] = this.#pointers.values(), apart = distance(a, b), at = middle(a, b);
      this.move(at.x - this.#pinch.at.x, at.y - this.#pinch.at.y);
      this.by(apart / this.#pinch.apart, at);
      this.#pinch = { apart, at };
    } else if (this.#pressed) {
      const all = event.getCoalescedEvents?.() ?? [];
      for (const one of all.length ? all : [event]) this.#pressed.move?.(this.placeOf(one), one);
    } else this.move(now.x - before.x, now.y - before.y);
  }

  #up(event) {
    if (!this.#pointers.delete(event.pointerId)) return;
    if (this.#pointers.size < 2) this.#pinch = null;
    if (this.#pointers.size) return;
    if (event.type === "pointercancel") this.#pressed?.cancel?.(); else this.#pressed?.end?.();
    this.#pressed = null;
  }
}
