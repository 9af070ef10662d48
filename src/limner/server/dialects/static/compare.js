// Any two pictures beside each other or under a slider. `pictures()` gives what there is: [{id, group, name, path or url}].

import { byId, h } from "./dom.js";
import * as api from "./api.js";

export class Compare {
  #dialog = byId("compare");
  #stage = byId("stage");
  #divide = byId("divide");
  #sides = { a: byId("compare-a"), b: byId("compare-b") };
  #found = new Map();

  constructor(pictures) {
    this.pictures = pictures;
    for (const side of ["a", "b"]) this.#sides[side].addEventListener("change", () => this.#load(side));
    this.#divide.addEventListener("input", () => this.#stage.style.setProperty("--divide", `${this.#divide.value}%`));
    for (const view of this.#dialog.querySelectorAll("[name=view]")) {
      view.addEventListener("change", () => { this.#stage.dataset.view = view.value; });
    }
    byId("compare-swap").addEventListener("click", () => {
      const { a, b } = this.#sides;
      [a.value, b.value] = [b.value, a.value];
      this.#load("a");
      this.#load("b");
    });
    byId("compare-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("click", (event) => { if (event.target === this.#dialog) this.#dialog.close(); });
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
    this.#stage.style.setProperty("--divide", "50%");
    this.#load("a");
    this.#load("b");
    this.#dialog.showModal();
    this.#divide.focus();
  }

  async #load(side) {
    const { path, url, group, name } = this.#found.get(this.#sides[side].value);
    const image = byId(`picture-${side}`);
    image.alt = `${side === "a" ? "Left" : "Right"}: ${group}, ${name}`;
    image.src = url ?? await api.pictureURL(path);
    if (side === "b") {
      await image.decode().catch(() => {});
      if (image.naturalWidth) this.#stage.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    }
  }
}
