// Outpainting: a frame around a picture whose sides are dragged outwards, moved by arrow keys, or typed.

import { announce, byId, h } from "./dom.js";

const SIDES = ["left", "top", "right", "bottom"];
const SNAP = 8, STEP = 16, LEAP = 64; // pixels: of dragging, of arrow keys, and with Shift
const CORNERS = [[0, 1], [2, 1], [2, 3], [0, 3]];

export class Frame extends EventTarget {
  margins = [0, 0, 0, 0]; // left, top, right, bottom
  #size = [1, 1];
  #most = Infinity; // pixels of the new picture
  #old = byId("frame-old");
  #new = byId("frame-new");
  #fields = SIDES.map((side) => byId(`expand-${side}`));
  #handles;
  #corners;

  /** `zoom` places the frame over its picture. */
  constructor(zoom) {
    super();
    this.zoom = zoom;
    this.#handles = SIDES.map((side, i) => {
      const handle = h("div", {
        className: `handle at-${side}`, tabIndex: 0, role: "slider", "aria-label": `New area, ${side}`, "aria-valuemin": 0,
        "aria-orientation": i % 2 ? "vertical" : "horizontal",
      });
      handle.addEventListener("keydown", (event) => this.#key(event, i));
      return handle;
    });
    this.#corners = CORNERS.map((sides) => h("div", { className: `handle corner ${sides.map((i) => `at-${SIDES[i]}`).join(" ")}`, "aria-hidden": "true" }));
    this.#new.append(...this.#handles, ...this.#corners);
    this.#fields.forEach((field, i) => field.addEventListener("change", () => {
      const value = Math.round(Number(field.value));
      this.set(this.margins.with(i, Number.isFinite(value) ? value : 0));
      this.fit();
    }));
    byId("expand-reset").addEventListener("click", () => {
      this.set([0, 0, 0, 0]);
      this.fit();
    });
  }

  /** Shows the frame of a picture of a size; the new one may have `most` pixels. */
  open(size, margins, most) {
    this.#size = size;
    this.#most = most;
    this.margins = [0, 0, 0, 0];
    this.set(margins ?? [0, 0, 0, 0]);
  }

  get box() {
    const [left, top, right, bottom] = this.margins, [width, height] = this.#size;
    return [-left, -top, width + right, height + bottom];
  }

  /** Sets the margins as far as they are allowed. */
  set(margins) {
    const wanted = margins.map((value) => Math.max(0, value));
    const [width, height] = this.#size;
    if ((width + wanted[0] + wanted[2]) * (height + wanted[1] + wanted[3]) > this.#most) {
      announce(`That is over the ${this.#most} pixels that the server draws`);
    } else this.margins = wanted;
    const [left, top, right, bottom] = this.margins;
    this.margins.forEach((value, i) => {
      this.#fields[i].value = value;
      this.#handles[i].setAttribute("aria-valuenow", value);
      this.#handles[i].setAttribute("aria-valuemax", Math.max(value, 2 * Math.max(width, height)));
      this.#handles[i].setAttribute("aria-valuetext", `${value} pixels`);
    });
    byId("expand-size").textContent = this.margins.some(Boolean)
      ? `${width}x${height} becomes ${width + left + right}x${height + top + bottom}` : "Drag a side outwards.";
    this.place();
    this.dispatchEvent(new Event("change"));
  }

  place() {
    const [width, height] = this.#size;
    this.zoom.place(this.#new, this.box);
    this.zoom.place(this.#old, [0, 0, width, height]);
  }

  /** Shows all of the frame and some room around it to drag it into. */
  fit() {
    const [left, top, right, bottom] = this.box, room = Math.max(right - left, bottom - top) * 0.22;
    this.zoom.show([left - room, top - room, right + room, bottom + room]);
  }

  #key(event, side) {
    const outwards = [["ArrowLeft"], ["ArrowUp"], ["ArrowRight"], ["ArrowDown"]][side];
    const inwards = [["ArrowRight"], ["ArrowDown"], ["ArrowLeft"], ["ArrowUp"]][side];
    const more = outwards.includes(event.key) || event.key === "PageUp", less = inwards.includes(event.key) || event.key === "PageDown";
    const home = event.key === "Home";
    if (!more && !less && !home) return;
    event.preventDefault();
    event.stopPropagation();
    const by = event.shiftKey || event.key.startsWith("Page") ? LEAP : STEP, now = this.margins[side];
    this.set(this.margins.with(side, home ? 0 : now + (more ? by : -by)));
    this.fit();
  }

  /** The gesture of a pointer that takes hold of a side or corner, or null. */
  press(place, event) {
    const at = [...this.#handles, ...this.#corners].indexOf(event.target);
    if (at < 0) return null;
    const sides = at < 4 ? [at] : CORNERS[at - 4], before = this.margins;
    if (at < 4) this.#handles[at].focus({ focusVisible: false });
    return {
      move: (now) => {
        const by = [place.x - now.x, place.y - now.y, now.x - place.x, now.y - place.y];
        let margins = before;
        for (const side of sides) margins = margins.with(side, Math.round((before[side] + by[side]) / SNAP) * SNAP);
        this.set(margins);
      },
      end: () => this.fit(),
      cancel: () => this.set(before),
    };
  }
}
