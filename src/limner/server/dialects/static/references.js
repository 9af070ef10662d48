// The ordered references, and the handle that the server knows them by.
//
// The server keeps the K/V of an ordered set of pictures. So the set is sent when it changes, and never otherwise: sets
// that were sent before are known by the digests of their pictures, in order.

import { announce, byId, plural } from "./dom.js";
import * as api from "./api.js";
import { newItem, showItem } from "./reference.js";

const PAUSE = 150; // ms that more changes may follow in
const DRAGGED = "application/x-limner-reference";

export class References extends EventTarget {
  items = []; // see reference.js
  #known = new Map(); // digests in order to handle
  #settled = Promise.resolve(null);
  #list = byId("references");
  #dragged = null;
  #version = 0;
  #weighted = false;
  #background = null; // a colour, once one was chosen

  constructor() {
    super();
    this.#list.addEventListener("dragover", (event) => this.#over(event));
    this.#list.addEventListener("drop", (event) => this.#drop(event));
    this.#list.addEventListener("dragend", () => this.#mark(null));
  }

  /** Whether the server takes weights of references. */
  set weighted(on) {
    this.#weighted = on;
    this.#render();
  }

  /** Pictures of this machine, or results: File or Blob with a name. */
  add(files) {
    for (const file of files) {
      this.items.push(this.#item({ name: file.name || "picture", url: URL.createObjectURL(file), data: async () => file }));
    }
    if (files.length) this.#changed(`${plural(files.length, "picture")} added`);
  }

  /** The references of a run or of a handle, instead of those that are here. `path(n)` gives picture n. */
  async replace({ count, reports, path, handle, names, weights }) {
    const urls = await Promise.all(Array.from({ length: count }, (_, i) => api.pictureURL(path(i + 1))));
    this.items = urls.map((url, i) => this.#item({
      name: names?.[i] || `image ${i + 1}`, url, data: () => api.blob(path(i + 1)), report: reports?.[i] ?? null,
      digest: reports?.[i]?.digest, isServers: true, weight: weights?.[i] ?? 1,
    }));
    if (handle && this.items.every((item) => item.digest)) this.#known.set(this.#signature(this.items), handle);
    this.#changed(`${plural(count, "reference")} taken over`);
  }

  /** What stands behind pictures that are transparent, or null: then such pictures are refused. */
  get background() {
    return this.items.some((item) => item.transparent) ? this.#background : null;
  }

  /** Puts a colour behind all pictures that are transparent. */
  fill(colour) {
    this.#background = colour;
    this.#known.clear(); // the digests were of other pictures
    for (const item of this.items) if (item.transparent) Object.assign(item, { problem: "", report: null, digest: undefined });
    this.#changed(`What is transparent is ${colour} now`);
  }

  /** No picture asks for a colour any more; one that was taken on the colour unasked is looked at again. */
  #forgetBackground() {
    this.#background = null;
    for (const item of this.items) if (!item.isServers) Object.assign(item, { report: null, digest: undefined });
  }

  clear() {
    this.items = [];
    this.#changed("");
  }

  /** The handle of the set as it is, or null where there is none. Throws what was refused. */
  async handle({ focus = false } = {}) {
    for (let version = -1; version !== this.#version;) {
      version = this.#version;
      await this.#settled.catch(() => {
        if (version === this.#version) this.#settled = this.#send(version); // once more: the server may be back
        return this.#settled;
      });
    }
    const refused = this.items.findIndex((item) => item.problem);
    if (refused >= 0) {
      if (focus) this.items[refused].drop.focus();
      throw new api.Refused(422, `${this.items[refused].name} cannot be used: ${this.items[refused].problem} ${this.items[refused].transparent ? "Choose a background, or remove it." : "Remove it first."}`, "");
    }
    return this.#settled;
  }

  #item(values) {
    const item = newItem(values, {
      move: (by) => this.#move(item, by), remove: () => this.#remove(item), weigh: () => this.dispatchEvent(new Event("weigh")),
      fill: (colour) => this.fill(colour),
    });
    item.element.addEventListener("dragstart", (event) => {
      this.#dragged = item;
      event.dataTransfer.setData(DRAGGED, "");
      event.dataTransfer.effectAllowed = "move";
    });
    return item;
  }

  #move(item, by) {
    const from = this.items.indexOf(item), to = from + by;
    if (to < 0 || to >= this.items.length) return;
    this.items.splice(from, 1);
    this.items.splice(to, 0, item);
    this.#changed(`${item.name} is image ${to + 1} now`);
    const button = by < 0 ? item.left : item.right;
    (button.disabled ? (by < 0 ? item.right : item.left) : button).focus();
  }

  #remove(item) {
    const at = this.items.indexOf(item);
    this.items.splice(at, 1);
    this.#changed(`${item.name} removed`);
    (this.items[Math.min(at, this.items.length - 1)]?.drop ?? byId("choose")).focus();
  }

  #place(event) {
    const target = event.target.closest?.("li");
    if (!target) return { target: this.items.at(-1)?.element, after: true };
    const box = target.getBoundingClientRect();
    return { target, after: event.clientX > box.left + box.width / 2 };
  }

  #over(event) {
    if (!this.#dragged) return;
    event.preventDefault();
    this.#mark(this.#place(event));
  }

  #drop(event) {
    if (!this.#dragged) return;
    event.preventDefault();
    event.stopPropagation();
    const { target, after } = this.#place(event), item = this.#dragged;
    this.#mark(null);
    this.#dragged = null;
    const rest = this.items.filter((other) => other !== item);
    const at = rest.findIndex((other) => other.element === target);
    if (at < 0) return;
    rest.splice(at + (after ? 1 : 0), 0, item);
    this.items = rest;
    this.#changed(`${item.name} is image ${rest.indexOf(item) + 1} now`);
  }

  #mark(place) {
    for (const item of this.items) {
      item.element.classList.toggle("before", place?.target === item.element && !place.after);
      item.element.classList.toggle("after", place?.target === item.element && place.after);
    }
    if (!place) this.#dragged = null;
  }

  #signature(items) {
    return items.every((item) => item.digest) ? items.map((item) => item.digest).join() : null;
  }

  #changed(told) {
    this.#version += 1;
    if (this.#background && !this.items.some((item) => item.transparent)) this.#forgetBackground();
    this.#render();
    if (told) announce(told);
    this.#settled = this.#send(this.#version);
    this.#settled.catch(() => {}); // handle() throws it again
    this.dispatchEvent(new Event("change"));
  }

  /** Makes the set known to the server; the handle, or null where there is no picture or the set changed meanwhile. */
  async #send(version) {
    const say = (text) => { if (version === this.#version) byId("reference-state").textContent = text; };
    say("");
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
    try {
      for (;;) { // once more for each picture that is refused
        const items = this.items.filter((item) => !item.problem);
        if (version !== this.#version || !items.length) { say(""); return null; }
        const signature = this.#signature(items);
        if (this.#known.has(signature)) { say(""); return this.#known.get(signature); }
        const sending = (share) => say(share < 1 ? `Sending, ${Math.floor(share * 100)} %` : "Reading …");
        say("Sending …");
        const form = new FormData();
        for (const item of items) form.append("image", await item.data(), item.name);
        form.append("prefill", "false");
        if (this.background) form.append("background", this.background);
        try {
          const told = await api.post("/v1/references", form, { onProgress: sending });
          items.forEach((item, i) => { item.report ??= told.references[i]; item.digest = told.references[i].digest; });
          this.#known.set(this.#signature(items), told.id);
          if (version === this.#version) { this.#render(); say(""); this.dispatchEvent(new Event("report")); }
          return told.id;
        } catch (error) {
          const refused = error.field === "image" && items[items.length === 1 ? 0 : error.index];
          if (!refused) throw error;
          refused.problem = error.message.replace(/^image: /, "").replace(/^picture \d+: /, "");
          if (error.type === "transparent") Object.assign(refused, { transparent: true, problem: "It is transparent in places." });
          this.#render();
          announce(`${refused.name} cannot be used: ${refused.problem}`);
        }
      }
    } catch (error) {
      say(`Not sent: ${error.message}`);
      throw error;
    }
  }

  #render() {
    const elements = this.items.map((item) => item.element);
    if (elements.length !== this.#list.children.length || elements.some((e, i) => e !== this.#list.children[i])) {
      this.#list.replaceChildren(...elements);
    }
    let number = 0;
    this.items.forEach((item, at) => {
      if (!item.problem) number += 1;
      showItem(item, { number, isFirst: at === 0, isLast: at === this.items.length - 1, weighted: this.#weighted });
    });
  }
}
