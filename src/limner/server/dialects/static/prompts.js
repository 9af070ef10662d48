// Prompts of before: kept by the browser, or with a key by the tab, and offered again.

import { announce, byId, h } from "./dom.js";

const KEPT = "limner.prompts";
const MOST = 40;

export class Prompts {
  #field = byId("prompt");
  #at = -1; // which of them is in the field; -1: what is being written
  #written = "";

  constructor() {
    this.#field.addEventListener("keydown", (event) => {
      if (!event.altKey || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
      event.preventDefault();
      this.#step(event.key === "ArrowUp" ? 1 : -1);
    });
    this.#field.addEventListener("input", (event) => { if (event.isTrusted) this.#at = -1; });
    byId("prompts-clear").addEventListener("click", () => {
      this.#store.removeItem(KEPT);
      this.#show();
      announce("Earlier prompts forgotten");
      this.#field.focus();
    });
    this.#show();
  }

  /** With a key the browser may be somebody else's tomorrow. */
  get #store() {
    return sessionStorage.getItem("limner.key") ? sessionStorage : localStorage;
  }

  get #all() {
    try {
      return JSON.parse(this.#store.getItem(KEPT) ?? "[]");
    } catch {
      return [];
    }
  }

  /** Keeps a prompt that was drawn. */
  add(prompt) {
    try {
      this.#store.setItem(KEPT, JSON.stringify([prompt, ...this.#all.filter((other) => other !== prompt)].slice(0, MOST)));
    } catch { /* no room */ }
    this.#at = -1;
    this.#show();
  }

  #step(by) {
    const all = this.#all, at = this.#at + by;
    if (at < -1 || at >= all.length) return;
    if (this.#at < 0) this.#written = this.#field.value;
    this.#at = at;
    this.#take(at < 0 ? this.#written : all[at]);
  }

  #take(prompt) {
    this.#field.value = prompt;
    this.#field.dispatchEvent(new Event("input", { bubbles: true }));
    this.#field.dispatchEvent(new Event("change", { bubbles: true }));
  }

  #show() {
    const all = this.#all;
    byId("earlier").hidden = !all.length;
    byId("prompts").replaceChildren(...all.map((prompt) => h("li", {}, h("button", {
      type: "button", textContent: prompt, title: prompt, onclick: () => {
        this.#take(prompt);
        byId("earlier").open = false;
        this.#field.focus();
      },
    }))));
  }
}
