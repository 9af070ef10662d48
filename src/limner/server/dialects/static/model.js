// What the model is and can do: a dialog with its card; and which words of a prompt it was never trained on.

import { byId, h, size } from "./dom.js";
import * as api from "./api.js";
import { markdown } from "./markdown.js";
import { unknownWords } from "./words.js";

const PAUSE = 400; // ms after the last letter
const SHOWN = 6; // words

export class Model {
  #able = null;
  #filled = false;
  #words = new Set();
  #pause = 0;

  constructor() {
    for (const id of ["model", "unknown-more"]) byId(id).addEventListener("click", () => this.open());
    byId("card-close").addEventListener("click", () => byId("card").close());
    byId("card").addEventListener("click", (event) => { if (event.target === byId("card")) byId("card").close(); });
    byId("prompt").addEventListener("input", () => {
      clearTimeout(this.#pause);
      this.#pause = setTimeout(() => this.check(), PAUSE);
    });
  }

  /** What the server draws with, of `GET /v1/capabilities`. */
  allow(able) {
    this.#able = able;
    this.#words = new Set(able.words ?? []);
    byId("model-name").textContent = able.model;
    byId("model").disabled = false;
  }

  /** Tells which words of the prompt the model does not know, if there is a list of those that it does. */
  check() {
    const unknown = this.#words.size ? unknownWords(byId("prompt").value, this.#words) : [];
    byId("unknown").hidden = !unknown.length;
    const small = (word) => (this.#words.has(word.toLowerCase()) ? ` (write “${word.toLowerCase()}”)` : "");
    const text = `${unknown.slice(0, SHOWN).map((word) => `“${word}”${small(word)}`).join(", ")}${unknown.length > SHOWN ? " …" : ""}`;
    byId("unknown-words").textContent = unknown.length ? `This model was not trained on ${text}.` : "";
  }

  async open() {
    byId("card").showModal();
    byId("card").scrollTop = 0;
    if (this.#filled || !this.#able) return;
    this.#filled = true;
    const { model, version, sizes, references_attention: attention, is_distilled: distilled, num_inference_steps: steps, loras, max_references: references } = this.#able;
    const facts = [
      ["Model", model], ["LoRAs", (loras ?? []).map(({ name, strength }) => `${name}, strength ${strength}`).join("; ") || "none"],
      ["Sizes", sizes?.length ? sizes.map(size).join(", ") : "any"], ["Steps", `${steps}${distilled ? ", without guidance" : ", with guidance"}`],
      ["References", `up to ${references}; ${attention === "isolated" ? "their K/V are kept" : "they are read in every step"}`], ["Limner", version],
    ];
    byId("card-facts").replaceChildren(...facts.flatMap(([name, value]) => [h("dt", { textContent: name }), h("dd", { textContent: value })]));
    try {
      const { card, url } = await api.get("/v1/model-card");
      const missing = url ? [h("p", {}, "Its card stands at ", h("a", { href: url, target: "_blank", rel: "noopener noreferrer", textContent: url }), ".")]
        : [h("p", { textContent: "The model's folder has no card (README.md)." })];
      byId("card-text").replaceChildren(...(card ? markdown(card) : missing));
    } catch (error) {
      this.#filled = false;
      byId("card-text").replaceChildren(h("p", { className: "error", textContent: error.message }));
    }
  }
}
