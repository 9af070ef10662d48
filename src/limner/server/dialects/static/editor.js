// The dialog in which a part of a picture is painted, or its frame extended. What is done there holds at once.
//
// The board has the focus for keys: arrows move the brush, Space lowers and lifts it. Shortcuts that are a single
// character work on the board alone.

import { announce, byId, percent } from "./dom.js";
import { Frame } from "./frame.js";
import { Mask } from "./mask.js";
import { Zoom } from "./zoom.js";

const SIZES = { least: 1, most: 1 / 2 }; // of the brush: pixels; share of the shorter side
const FIRST = 1 / 8;
const PAUSE = 400; // ms after the last arrow key until the place is said
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Editor {
  #dialog = byId("editor");
  #board = byId("board");
  #picture = byId("board-picture");
  #tint = byId("board-mask");
  #ring = byId("board-ring");
  #marked = byId("board-rectangle");
  #size = byId("brush");
  #eraser = byId("erase");
  #mask = null;
  #width = 1;
  #height = 1;
  #cursor = { x: 0, y: 0 };
  #byKeys = false; // whether the brush is moved by keys, and lowered
  #down = false;
  #corner = null; // the first one of a rectangle
  #saying = 0;
  #closed = null;

  constructor() {
    this.zoom = new Zoom(this.#board, { changed: () => this.#place(), press: (place, event) => this.#press(place, event) });
    this.frame = new Frame(this.zoom);
    for (const mode of this.#dialog.querySelectorAll("[name=mode]")) mode.addEventListener("change", () => this.#show(mode.value));
    for (const tool of this.#dialog.querySelectorAll("[name=tool]")) tool.addEventListener("change", () => this.#lift());
    this.#size.addEventListener("input", () => this.#sized());
    this.#eraser.addEventListener("click", () => this.#setErase(!this.#erases));
    for (const name of ["undo", "redo", "invert", "clear"]) byId(`mask-${name}`).addEventListener("click", () => this.#do(name));
    byId("board-in").addEventListener("click", () => this.zoom.by(1.5));
    byId("board-out").addEventListener("click", () => this.zoom.by(1 / 1.5));
    byId("board-fit").addEventListener("click", () => this.zoom.fit());
    byId("editor-done").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("keydown", (event) => this.#shortcut(event));
    this.#dialog.addEventListener("cancel", (event) => { if (this.#giveUp()) event.preventDefault(); });
    this.#dialog.addEventListener("close", () => this.#close());
    this.#board.addEventListener("keydown", (event) => this.#key(event));
    this.#board.addEventListener("focus", () => this.#place());
    this.#board.addEventListener("blur", () => this.#lift());
    this.#board.addEventListener("pointermove", (event) => this.#hover(event));
    this.#board.addEventListener("contextmenu", (event) => event.preventDefault()); // the right button erases
    this.#board.addEventListener("pointerleave", () => { this.#ring.hidden = !this.#byKeys; });
  }

  /**
   * Opens over a picture (ImageBitmap) in a mode, "paint" or "extend", with what was done before: {mask, margins, blur}.
   * Gives the same when it is closed. `most`: pixels that an extended picture may have.
   */
  open(picture, { mode, mask, margins, blur, most }) {
    const { width, height } = picture;
    Object.assign(this.#picture, { width, height });
    this.#picture.getContext("2d").drawImage(picture, 0, 0);
    [this.#width, this.#height] = [width, height];
    this.#mask = mask?.width === width && mask.height === height ? mask : new Mask(width, height);
    this.#mask.addEventListener("change", this.#painted);
    this.#tint.replaceWith(Object.assign(this.#mask.canvas, { id: "board-mask", className: "tint" }));
    this.#tint = this.#mask.canvas;
    this.#size.max = Math.max(8, Math.round(Math.min(width, height) * SIZES.most));
    this.#size.min = SIZES.least;
    this.#size.value = Math.round(Math.min(width, height) * FIRST);
    this.#cursor = { x: Math.round(width / 2), y: Math.round(height / 2) };
    this.#byKeys = false;
    this.#setErase(false);
    byId("feather").value = blur;
    this.#dialog.querySelector("[name=tool][value=brush]").checked = true;
    this.#dialog.querySelector(`[name=mode][value=${mode}]`).checked = true;
    this.frame.open([width, height], margins, most);
    this.#dialog.showModal();
    this.#show(mode);
    this.#sized();
    this.#painted();
    return new Promise((resolve) => { this.#closed = resolve; });
  }

  #close() {
    this.#lift();
    const blur = byId("feather").valueAsNumber;
    this.#mask.removeEventListener("change", this.#painted);
    const { margins } = this.frame;
    this.#closed({
      mask: this.#mask.share ? this.#mask : null, margins: margins.some(Boolean) ? margins : null,
      blur: Number.isInteger(blur) && blur >= 0 ? blur : null, mode: this.#mode,
    });
  }

  #show(mode) {
    this.#dialog.dataset.mode = mode;
    byId("paint-tools").hidden = mode !== "paint";
    byId("extend-tools").hidden = mode !== "extend";
    for (const element of [this.#tint, this.#ring]) element.hidden = mode !== "paint";
    for (const id of ["frame-old", "frame-new"]) byId(id).hidden = mode !== "extend";
    // in the frame's mode its sides are what has the focus
    this.#board.tabIndex = mode === "paint" ? 0 : -1;
    this.#board.setAttribute("role", mode === "paint" ? "application" : "group");
    this.#board.setAttribute("aria-label", mode === "paint" ? "Picture to paint on" : "Picture and its frame");
    byId("keys-paint").hidden = mode !== "paint";
    byId("keys-extend").hidden = mode !== "extend";
    if (mode === "paint") {
      this.zoom.show([0, 0, this.#width, this.#height]);
      this.#board.focus({ focusVisible: false });
    } else this.frame.fit();
    this.#tell();
  }

  get #mode() {
    return this.#dialog.querySelector("[name=mode]:checked").value;
  }

  get #tool() {
    return this.#dialog.querySelector("[name=tool]:checked").value;
  }

  get #erases() {
    return this.#eraser.getAttribute("aria-pressed") === "true";
  }

  #setErase(on) {
    this.#eraser.setAttribute("aria-pressed", on);
    this.#ring.classList.toggle("erases", on);
  }

  // what is seen

  #place() {
    const { x, y } = this.#cursor, reach = this.#size.valueAsNumber / 2;
    this.zoom.place(this.#picture, [0, 0, this.#width, this.#height]);
    this.zoom.place(this.#tint, [0, 0, this.#width, this.#height]);
    this.zoom.place(this.#ring, [x - reach, y - reach, x + reach, y + reach]);
    this.#mark();
    this.frame?.place();
  }

  #mark() {
    this.#marked.hidden = !this.#corner;
    if (!this.#corner) return;
    const a = this.#corner, b = this.#cursor;
    this.zoom.place(this.#marked, [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)]);
  }

  #painted = () => {
    byId("mask-undo").disabled = !this.#mask.canUndo;
    byId("mask-redo").disabled = !this.#mask.canRedo;
    byId("mask-clear").disabled = !this.#mask.share;
    this.#tell();
  };

  #tell() {
    const paints = this.#mode === "paint", share = this.#mask.share;
    byId("editor-state").textContent = !paints ? "" : share ? `${percent(share)} is painted, and will be drawn anew.` : "Paint over what is to change.";
  }

  #sized() {
    byId("brush-size").textContent = `${this.#size.value} px`;
    this.#place();
  }

  #hover(event) {
    if (event.pointerType === "touch" || this.#mode !== "paint") return;
    this.#byKeys = false;
    this.#ring.hidden = this.#tool !== "brush";
    this.#cursor = this.zoom.placeOf(event);
    this.#place();
  }

  // painting by pointer

  #press(place, event) {
    if (this.#mode === "extend") return this.frame.press(place, event);
    this.#lift();
    this.#board.focus({ focusVisible: false });
    if (this.#tool === "move") return null;
    const erase = this.#erases || event.altKey || event.button === 2;
    this.#byKeys = false;
    this.#cursor = place;
    if (this.#tool === "rectangle") {
      this.#corner = place;
      return {
        move: (now) => { this.#cursor = this.#inside(now); this.#mark(); },
        end: () => this.#rectangle(erase),
        cancel: () => this.#lift(),
      };
    }
    const size = this.#size.valueAsNumber;
    let before = place;
    this.#mask.begin();
    this.#mask.line(place, place, size, { erase });
    return {
      move: (now) => {
        this.#mask.line(before, now, size, { erase });
        this.#cursor = before = now;
        this.#place();
      },
      end: () => this.#mask.end(),
      cancel: () => this.#mask.cancel(),
    };
  }

  #rectangle(erase) {
    const corner = this.#corner;
    if (!corner) return; // it was given up
    this.#corner = null;
    this.#mask.rectangle(this.#inside(corner), this.#inside(this.#cursor), { erase });
    this.#mark();
  }

  #inside({ x, y }) {
    return { x: Math.min(this.#width, Math.max(0, x)), y: Math.min(this.#height, Math.max(0, y)) };
  }

  // painting by keys

  /** Ends what keys have begun. */
  #lift() {
    if (this.#down) {
      this.#down = false;
      this.#mask.end();
    }
    this.#corner = null;
    this.#ring.classList.remove("down");
    this.#mark();
  }

  #key(event) {
    if (this.#mode !== "paint" || event.ctrlKey || event.metaKey || event.target !== this.#board) return;
    const arrow = ARROWS[event.key];
    if (arrow) this.#arrow(arrow, event);
    else if (event.key === " ") this.#pen(event.repeat);
    else if (event.key === "Enter") this.#pen(event.repeat);
    else if (event.key === "Delete" || event.key === "Backspace") this.#do("clear");
    else {
      const action = {
        "[": () => this.#resize(-1), "]": () => this.#resize(1), "+": () => this.zoom.by(1.5), "=": () => this.zoom.by(1.5),
        "-": () => this.zoom.by(1 / 1.5), "0": () => this.zoom.fit(), b: () => this.#choose("brush"), r: () => this.#choose("rectangle"),
        m: () => this.#choose("move"), e: () => { this.#setErase(!this.#erases); announce(this.#erases ? "Erasing" : "Painting"); },
        i: () => this.#do("invert"),
      }[event.key.toLowerCase()];
      if (!action) return;
      action();
    }
    event.preventDefault();
  }

  #choose(tool) {
    this.#dialog.querySelector(`[name=tool][value=${tool}]`).checked = true;
    this.#lift();
    announce({ brush: "Brush", rectangle: "Rectangle", move: "Move the picture" }[tool]);
  }

  #resize(by) {
    const value = this.#size.valueAsNumber, step = Math.max(1, Math.round(value / 8));
    this.#size.value = value + by * step;
    this.#sized();
    announce(`Brush of ${this.#size.value} pixels`);
  }

  #arrow([right, down], event) {
    if (this.#tool === "move") {
      this.zoom.move(-right * 40, -down * 40);
      return;
    }
    const size = this.#size.valueAsNumber;
    const by = event.altKey ? 1 : event.shiftKey ? Math.max(4, size) : Math.max(1, Math.round(size / 4));
    const before = this.#cursor;
    this.#byKeys = true;
    this.#ring.hidden = false;
    this.#cursor = this.#inside({ x: Math.round(before.x) + right * by, y: Math.round(before.y) + down * by });
    if (this.#down) this.#mask.line(before, this.#cursor, size, { erase: this.#erases });
    this.zoom.reveal(this.#cursor);
    clearTimeout(this.#saying);
    this.#saying = setTimeout(() => {
      const { x, y } = this.#cursor;
      announce(`${Math.round(x)}, ${Math.round(y)}, ${this.#mask.has(this.#cursor) ? "painted" : "not painted"}`);
    }, PAUSE);
  }

  /** Lowers or lifts the brush, or sets a corner of a rectangle. */
  #pen(repeated) {
    if (repeated || this.#tool === "move") return;
    this.#byKeys = true;
    this.#ring.hidden = false;
    if (this.#tool === "rectangle") {
      if (this.#corner) {
        this.#rectangle(this.#erases);
        announce("Rectangle painted");
      } else {
        this.#corner = this.#inside(this.#cursor);
        announce("First corner set; move to the other, and press Space");
      }
      this.#mark();
      return;
    }
    if (this.#down) {
      this.#lift();
      announce("Brush lifted");
      return;
    }
    this.#down = true;
    this.#ring.classList.add("down");
    this.#mask.begin();
    this.#mask.line(this.#cursor, this.#cursor, this.#size.valueAsNumber, { erase: this.#erases });
    announce(this.#erases ? "Brush lowered, erasing" : "Brush lowered");
  }

  #do(name) {
    this.#lift();
    this.#mask[name]();
    announce({ undo: "Undone", redo: "Done again", invert: "Inverted", clear: "Cleared" }[name]);
    // a button that is disabled now loses the focus
    if (!this.#dialog.contains(document.activeElement) || document.activeElement.disabled) this.#board.focus();
  }

  /** Gives up what keys or a pointer have begun, and says whether that was anything. */
  #giveUp() {
    if (!this.zoom.cancel() && !this.#down && !this.#corner) return false;
    this.#lift();
    return true;
  }

  #shortcut(event) {
    // here already: Chromium lets a dialog refuse to be closed only once
    if (event.key === "Escape" && this.#giveUp()) event.preventDefault();
    if (this.#mode !== "paint" || !(event.ctrlKey || event.metaKey) || event.target.matches("input[type=number]")) return;
    const key = event.key.toLowerCase();
    if (key !== "z" && key !== "y") return;
    event.preventDefault();
    this.#do(key === "y" || event.shiftKey ? "redo" : "undo");
  }
}
