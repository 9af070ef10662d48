// Any two pictures under a slider, beside each other, or one alone; zoomed and moved. `pictures()` gives what there is:
// [{id, group, name, path or url, margins}].

import { announce, byId, h, percent, whilePressed } from "./dom.js";
import * as api from "./api.js";
import { Zoom } from "./zoom.js";

const STEP = 40; // stage pixels, of arrow keys
const NEAR = 22; // stage pixels around the divide that take hold of it
const ARROWS = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

export class Compare {
  #dialog = byId("compare");
  #stage = byId("stage");
  #divide = byId("divide");
  #sides = { a: byId("compare-a"), b: byId("compare-b") };
  #images = { a: byId("picture-a"), b: byId("picture-b") };
  #layers = { a: byId("layer-a"), b: byId("layer-b") };
  #loads = { a: 0, b: 0 }; // how many were begun
  #found = new Map();
  #size = [1, 1]; // of the right picture

  constructor(pictures) {
    this.pictures = pictures;
    this.zoom = new Zoom(this.#stage, {
      changed: () => this.#place(),
      press: (_, event) => this.#press(event),
      view: (event) => this.#layer(event),
    });
    for (const side of ["a", "b"]) this.#sides[side].addEventListener("change", () => this.#load(side));
    this.#divide.addEventListener("input", () => this.#divided());
    for (const view of this.#dialog.querySelectorAll("[name=view]")) view.addEventListener("change", () => this.#show(view.value));
    whilePressed(byId("compare-hold"), (on) => this.#stage.classList.toggle("held", on));
    byId("compare-swap").addEventListener("click", () => {
      const { a, b } = this.#sides;
      [a.value, b.value] = [b.value, a.value];
      this.#load("a");
      this.#load("b");
    });
    byId("compare-in").addEventListener("click", () => this.zoom.by(1.5));
    byId("compare-out").addEventListener("click", () => this.zoom.by(1 / 1.5));
    byId("compare-fit").addEventListener("click", () => this.zoom.fit());
    byId("compare-exact").addEventListener("click", () => this.zoom.exact());
    byId("compare-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("click", (event) => { if (event.target === this.#dialog) this.#dialog.close(); });
    this.#stage.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Opens with the picture `right`, and on the left what it was made from, or else another one. */
  open(right, left) {
    const all = this.pictures();
    this.#found = new Map(all.map((picture) => [picture.id, picture]));
    for (const select of Object.values(this.#sides)) {
      const groups = new Map();
      for (const { id, group, name } of all) {
        if (!groups.has(group)) groups.set(group, h("optgroup", { label: group }));
        groups.get(group).append(h("option", { value: id, textContent: name }));
      }
      select.replaceChildren(...groups.values());
    }
    this.#sides.b.value = right;
    this.#sides.a.value = this.#found.has(left) ? left : all.find(({ id }) => id !== right)?.id ?? right;
    this.#divide.value = 50;
    this.#dialog.showModal();
    // a picture that was made from none is looked at alone
    const view = this.#found.has(left) ? "slider" : "one";
    this.#dialog.querySelector(`[name=view][value=${view}]`).checked = true;
    this.#show(view);
    this.#load("b");
    this.#load("a");
    (view === "slider" ? this.#divide : this.#stage).focus();
  }

  /** The element that an event is over. */
  #layer(event) {
    if (this.#view !== "side") return this.#stage;
    const { a, b } = this.#layers;
    return event && event.clientX < b.getBoundingClientRect().left ? a : b;
  }

  get #view() {
    return this.#stage.dataset.view;
  }

  #show(view) {
    this.#stage.dataset.view = view;
    this.#divided();
    this.zoom.fit();
  }

  #divided() {
    this.#stage.style.setProperty("--divide", `${this.#divide.value}%`);
  }

  #picture(side) {
    return this.#found.get(this.#sides[side].value);
  }

  async #load(side) {
    const picture = this.#picture(side), image = this.#images[side], mine = ++this.#loads[side];
    const isOver = () => mine !== this.#loads[side]; // another one was chosen meanwhile
    image.alt = `${side === "a" ? "Left" : "Right"}: ${picture.group}, ${picture.name}`;
    try {
      const url = picture.url ?? await api.pictureURL(picture.path);
      if (isOver()) return;
      image.src = url;
      await image.decode();
    } catch (error) {
      if (isOver()) return;
      image.removeAttribute("src"); // what was there before is another picture
      image.alt += ", which cannot be shown";
      announce(`${picture.name} cannot be shown: ${error.message}`);
    }
    if (isOver()) return;
    if (side === "b" && image.naturalWidth) {
      this.#size = [image.naturalWidth, image.naturalHeight];
      this.#stage.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
      this.zoom.show([0, 0, ...this.#size]);
    } else this.#place();
  }

  #place() {
    const [width, height] = this.#size, whole = [0, 0, width, height];
    const from = this.#picture("a"), of = (picture) => picture?.id.split("/")[0];
    this.zoom.place(this.#images.b, whole);
    // what was extended stands where it stands in the result
    const [left, top, right, bottom] = (of(from) === of(this.#picture("b")) && from?.margins) || [0, 0, 0, 0];
    this.zoom.place(this.#images.a, [left, top, width - right, height - bottom]);
    byId("compare-scale").textContent = percent(this.zoom.scale * devicePixelRatio);
  }

  /** Takes hold of the divide; where it is far from the pointer and the pictures are zoomed, they are moved. */
  #press(event) {
    if (this.#view !== "slider") return null;
    const box = this.#stage.getBoundingClientRect(), at = (place) => ((place.clientX - box.left) / box.width) * 100;
    const apart = (Math.abs(at(event) - this.#divide.valueAsNumber) * box.width) / 100;
    if (this.zoom.zoomed && apart > NEAR) return null;
    const move = (_, now) => {
      this.#divide.value = at(now);
      this.#divided();
    };
    const before = this.#divide.value;
    move(null, event);
    return { move, cancel: () => { this.#divide.value = before; this.#divided(); } };
  }

  #key(event) {
    const arrow = ARROWS[event.key];
    const action = arrow && event.target === this.#stage ? () => this.zoom.move(arrow[0] * STEP, arrow[1] * STEP)
      : { "+": () => this.zoom.by(1.5), "=": () => this.zoom.by(1.5), "-": () => this.zoom.by(1 / 1.5), 0: () => this.zoom.fit() }[event.key];
    if (!action || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    action();
  }
}
