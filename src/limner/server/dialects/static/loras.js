// Which of the loaded LoRAs act in a run, and how strongly.

import { byId, h } from "./dom.js";
import * as api from "./api.js";

const MOST = 2, STEP = 0.05; // of the slider; the number beside it takes any

export class Loras {
  #rows = new Map(); // name to {name, usual, on, slide, number}
  #section = byId("loras");
  #list = byId("loras-list");

  constructor() {
    byId("loras-usual").addEventListener("click", () => {
      this.values = null;
      this.#list.querySelector("input")?.focus(); // the button is gone
      this.#list.dispatchEvent(new Event("change", { bubbles: true }));
    });
  }

  /** What the server has, of `GET /v1/capabilities`: how strongly each acts in runs that do not say. */
  allow({ loras = [], references_attention: attention }) {
    this.#rows = new Map(loras.map(({ name, strength }) => [name, this.#row(name, strength)]));
    this.#list.replaceChildren(...[...this.#rows.values()].map(({ element }) => element));
    this.#section.hidden = !loras.length;
    byId("loras-hint").hidden = attention !== "isolated";
    this.values = null;
  }

  #row(name, usual) {
    const most = Math.max(MOST, Math.abs(usual)), about = `Strength of ${name}`;
    const on = h("input", { type: "checkbox" });
    const slide = h("input", { type: "range", min: usual < 0 ? -most : 0, max: most, step: STEP, "aria-label": about });
    const number = h("input", { type: "number", step: STEP, "aria-label": `${about}, as a number` });
    const element = h("li", {}, h("label", { className: "check" }, on, h("span", { textContent: name })), slide, number);
    const row = { name, usual, on, slide, number, element };
    slide.addEventListener("input", () => { number.value = slide.value; this.#tell(); });
    number.addEventListener("input", () => { slide.value = number.value; this.#tell(); });
    on.addEventListener("change", () => this.#tell());
    return row;
  }

  #set(row, strength) {
    row.on.checked = strength !== 0;
    row.number.value = strength || row.usual || 1;
    row.slide.value = row.number.value;
  }

  /** The strengths of those that act, by name; null: as the server was started. A number that is none is NaN. */
  get values() {
    const rows = [...this.#rows.values()].map((row) => ({ ...row, strength: row.on.checked ? row.number.valueAsNumber : 0 }));
    if (rows.every(({ strength, usual }) => strength === usual)) return null;
    return Object.fromEntries(rows.filter(({ on }) => on.checked).map(({ name, strength }) => [name, strength]));
  }

  set values(values) {
    for (const row of this.#rows.values()) this.#set(row, values === null ? row.usual : values[row.name] ?? 0);
    this.#tell();
  }

  #tell() {
    for (const { on, slide, number } of this.#rows.values()) {
      for (const field of [slide, number]) field.disabled = !on.checked;
      number.removeAttribute("aria-invalid");
    }
    byId("loras-usual").hidden = this.values === null;
  }

  /** Takes over what a run was asked for, or what acted in it. Gives the names of those that are not loaded now. */
  take({ controls, result }) {
    const acted = result?.limner?.loras, asked = controls?.loras;
    const values = asked ?? (acted && Object.fromEntries(acted.map(({ name, strength }) => [name, strength]))) ?? null;
    this.values = values;
    return Object.keys(values ?? {}).filter((name) => !this.#rows.has(name));
  }

  /** The field of a request; none where LoRAs act as the server was started. Throws what cannot be asked for. */
  fields() {
    const { values } = this;
    for (const [name, strength] of Object.entries(values ?? {})) {
      if (!Number.isFinite(strength)) throw new api.Refused(422, `The strength of ${name} is not a number; give one, or untick it.`, "loras");
    }
    return values ? { loras: values } : {};
  }

  /** Shows an error at the field that it is about; null: none. */
  complain(error) {
    for (const { number } of this.#rows.values()) number.removeAttribute("aria-invalid");
    if (!error?.field?.startsWith("loras")) return;
    const rows = [...this.#rows.values()], bad = rows.find(({ on, number }) => on.checked && !Number.isFinite(number.valueAsNumber));
    const field = bad?.number ?? rows[0]?.on;
    field?.setAttribute("aria-invalid", "true");
    field?.setAttribute("aria-errormessage", "error");
    field?.focus();
  }
}
