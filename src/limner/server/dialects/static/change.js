// What of image 1 changes: a part that is painted, new area around it, how strongly, and whether the rest is left alone.
//
// A picture keeps its mask and margins when the order changes; they count while it is image 1.

import { announce, byId, dataURL, h, percent, pictureOf } from "./dom.js";
import * as api from "./api.js";

const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];

export class Change extends EventTarget {
  #section = byId("change");
  #strength = byId("strength");
  #preserve = byId("preserve");
  #able = { controls: [], max_canvas_pixels: Infinity, mask_blur: 8 };
  #first = null;
  #editing = false;
  #shown = null; // what is drawn over the picture of image 1

  constructor(references, editor) {
    super();
    Object.assign(this, { references, editor });
    byId("paint").addEventListener("click", () => this.#edit("paint"));
    byId("extend").addEventListener("click", () => this.#edit("extend"));
    byId("whole").addEventListener("click", () => {
      this.#first.change = null;
      announce("The whole picture may change");
      this.#changed();
      byId("paint").focus();
    });
    this.#strength.addEventListener("input", () => this.#tell());
    this.#preserve.addEventListener("change", () => this.#changed());
    this.#strength.addEventListener("change", () => this.#changed());
    references.addEventListener("change", () => this.refresh());
    references.addEventListener("report", () => this.refresh());
  }

  /** What the server takes, of `GET /v1/capabilities`. */
  allow(able) {
    this.#able = { ...this.#able, ...able };
    const takes = (name) => this.#able.controls.includes(name);
    byId("paint").hidden = !takes("mask");
    byId("extend").hidden = !takes("expand");
    byId("strength-row").hidden = !takes("strength");
    byId("preserve-row").hidden = !takes("preserve");
    byId("likeness-row").hidden = !takes("reference_guidance");
    this.references.weighted = takes("reference_weights");
    this.refresh();
  }

  /** What of image 1 changes: "mask", "margins", or "" for all of it. */
  get part() {
    return this.#first?.change?.part ?? "";
  }

  get strength() {
    return this.#strength.valueAsNumber / 100;
  }

  set strength(value) {
    this.#strength.value = Math.round(value * 100);
    this.#tell();
  }

  get preserves() {
    return this.#preserve.checked && !this.part;
  }

  set preserves(on) {
    this.#preserve.checked = on;
    this.#tell();
  }

  /** Whether the result has the size of image 1, whatever is chosen. */
  get fixesSize() {
    return Boolean(this.#first) && this.#able.controls.length > 0 && (Boolean(this.part) || this.preserves || this.strength < 1);
  }

  refresh() {
    this.#first = this.references.items.find((item) => !item.problem) ?? null;
    this.#section.hidden = !this.#first || !this.#able.controls.length;
    this.#tell();
  }

  #changed() {
    this.#tell();
    this.dispatchEvent(new Event("change"));
  }

  #tell() {
    const { part } = this, change = this.#first?.change;
    const texts = {
      mask: () => `${percent(change.mask.share)} of it is drawn anew. Beyond its soft edge the rest stays to the pixel.`,
      margins: () => `New area: ${["left", "top", "right", "bottom"].map((side, i) => (change.margins[i] ? `${change.margins[i]} ${side}` : "")).filter(Boolean).join(", ")}.`,
    };
    const text = part ? texts[part]() : this.preserves ? "What the edit does not change stays to the pixel." : "All of it may change.";
    if (byId("change-state").textContent !== text) byId("change-state").textContent = text;
    byId("whole").hidden = !part;
    byId("strength-value").textContent = `${this.#strength.value} %`;
    this.#preserve.disabled = Boolean(part);
    this.#show();
  }

  /** Shows the mask over the small picture. */
  #show() {
    this.#shown?.remove();
    if (this.part !== "mask") return;
    const { canvas } = this.#first.change.mask;
    this.#shown = h("canvas", { className: "tint", width: canvas.width, height: canvas.height });
    this.#shown.getContext("2d").drawImage(canvas, 0, 0);
    this.#first.thumb.append(this.#shown);
  }

  async #edit(mode) {
    if (this.#editing) return; // a second click, before the picture is there
    const item = this.#first, before = item.change;
    this.#editing = true;
    try {
      const picture = await pictureOf(await this.#source(item));
      const done = await this.editor.open(picture, {
        mode, mask: before?.mask, margins: before?.margins, blur: before?.blur ?? this.#able.mask_blur, most: this.#able.max_canvas_pixels,
      });
      picture.close();
      const wanted = done.mode === "extend" ? "margins" : "mask", other = wanted === "mask" ? "margins" : "mask";
      const part = done[wanted] ? wanted : done[other] ? other : "";
      item.change = part || before?.canvas ? { ...done, part, canvas: before?.canvas } : null;
      this.#changed();
    } catch (error) {
      this.dispatchEvent(new CustomEvent("problem", { detail: error }));
    } finally {
      this.#editing = false;
    }
    byId(mode).focus();
  }

  /** The picture that is changed: the caller's own file, not what the model reads of it. */
  #source(item) {
    return item.change?.canvas?.() ?? item.data();
  }

  /** Takes over what a run was asked for; `canvas` and `mask` give its files, if it has them. */
  async take({ controls, canvas, mask }, toMask) {
    this.strength = controls?.strength ?? 1;
    this.preserves = controls?.preserve === "auto";
    this.refresh();
    if (!this.#first) return;
    const margins = Array.isArray(controls?.expand) ? controls.expand : null, painted = mask ? await toMask(await mask()) : null;
    const part = painted ? "mask" : margins ? "margins" : "";
    this.#first.change = part || canvas ? { mask: painted, margins, blur: controls?.mask_blur ?? null, part, canvas } : null;
    this.#changed();
  }

  /** The fields of a request. `handle`: image 1 is known to the server as the model reads it, so its file goes along. */
  async fields(handle) {
    const body = {}, { part, strength } = this, controls = this.#able.controls;
    if (!this.#first || !controls.length) return body;
    if (strength < 1) body.strength = strength;
    if (this.preserves) body.preserve = "auto";
    const { change } = this.#first;
    if (part === "mask") body.mask = await dataURL(await change.mask.file());
    if (part === "margins") body.expand = change.margins;
    if (part && change.blur !== null && change.blur !== this.#able.mask_blur) body.mask_blur = change.blur;
    const weights = this.references.items.filter((item) => !item.problem).map((item) => item.weight);
    if (controls.includes("reference_weights") && weights.some((weight) => weight !== 1)) body.reference_weights = weights;
    const likeness = byId("likeness").valueAsNumber;
    if (controls.includes("reference_guidance") && Number.isFinite(likeness) && likeness !== 1) body.reference_guidance = likeness;
    if (handle && this.fixesSize && (change?.canvas || !this.#first.isServers)) {
      body.canvas = await dataURL(await this.#sendable());
      if (this.references.background) body.background = this.references.background;
    }
    return body;
  }

  async #sendable() {
    const file = await this.#source(this.#first);
    if (!SENT_AS_THEY_ARE.includes(file.type)) throw new api.Refused(422, "image 1 is neither PNG, JPEG nor WebP; save it as one of these", "");
    return file;
  }
}
