// The fields of the form: what they offer, what they ask for, and what the server says of them.

import { byId, h, size } from "./dom.js";
import * as api from "./api.js";

const MAX_VARIATIONS = 8;
const SHAPES = [[1, 1], [5, 3], [3, 5]];
const NAMES = ["prompt", "size", "width", "height", "variations", "seed", "steps", "guidance", "negative", "likeness", "format"];
const FIELD_OF = {
  num_images: "variations", num_inference_steps: "steps", guidance: "guidance", negative_prompt: "negative", output_format: "format",
  reference_guidance: "likeness",
};

export class Form extends EventTarget {
  fields = Object.fromEntries(NAMES.map((name) => [name, byId(name)]));
  able = { default_size: [1024, 1024], grid: 16, max_images: MAX_VARIATIONS };

  constructor(references, change) {
    super();
    Object.assign(this, { references, change });
    for (let n = 1; n <= MAX_VARIATIONS; n += 1) this.fields.variations.append(h("option", { value: n, textContent: n }));
    this.fields.size.addEventListener("change", () => {
      this.refresh();
      const { size: chosen, width, height } = this.fields;
      if (chosen.value === "custom" && !width.value) [width.value, height.value] = this.able.default_size;
    });
    this.refresh();
  }

  /** What the server offers, of `GET /v1/capabilities`. */
  allow(able) {
    this.able = able;
    const { fields } = this;
    fields.steps.value = able.num_inference_steps;
    fields.guidance.value = able.guidance_scale;
    for (const label of document.querySelectorAll(".guided")) label.hidden = able.is_distilled;
    for (const option of [...fields.variations.options]) if (option.value > able.max_images) option.remove();
    for (const field of [fields.width, fields.height]) field.step = able.grid;
    this.refresh();
  }

  #sizes() {
    if (this.able.sizes?.length) return this.able.sizes; // those that the model has learned to draw
    const { default_size: [width, height], grid } = this.able, area = width * height;
    return SHAPES.map(([w, h_]) => [Math.sqrt(area * w / h_), Math.sqrt(area * h_ / w)].map((x) => Math.max(grid, Math.round(x / grid) * grid)));
  }

  /** Offers the sizes that there are now. */
  refresh(chosen = this.fields.size.value) {
    const { references, fields, able, change } = this;
    const first = references.items.find((item) => !item.problem)?.report?.processed_size;
    const auto = change.fixesSize ? "Image 1's own" : references.items.length ? `As image 1${first ? ` (${size(first)})` : ""}`
      : `The model's (${size(able.default_size)})`;
    fields.size.replaceChildren(
      h("option", { value: "", textContent: auto }),
      ...this.#sizes().map((pair) => h("option", { value: pair.join("x"), textContent: size(pair) })),
      h("option", { value: "custom", textContent: "Other …" }));
    fields.size.value = [...fields.size.options].some(({ value }) => value === chosen) ? chosen : "";
    fields.size.disabled = change.fixesSize;
    if (change.fixesSize) fields.size.selectedIndex = 0;
    byId("custom").hidden = fields.size.value !== "custom";
    byId("draw").textContent = references.items.length ? "Edit" : "Draw";
  }

  #chooseSize(width, height) {
    const { fields } = this;
    this.refresh(`${width}x${height}`);
    if (fields.size.value) return;
    this.refresh("custom");
    [fields.width.value, fields.height.value] = [width, height];
  }

  /** Sets the fields to what a run was asked for. */
  take(entry) {
    const { fields, able } = this;
    fields.prompt.value = entry.prompt;
    fields.seed.value = entry.seeds[0];
    fields.variations.value = Math.min(entry.num_images, MAX_VARIATIONS);
    fields.steps.value = entry.num_inference_steps;
    fields.guidance.value = entry.guidance_scale ?? able.guidance_scale;
    fields.negative.value = entry.negative_prompt ?? "";
    fields.likeness.value = entry.controls?.reference_guidance ?? "";
    fields.format.value = entry.output_format;
    this.#chooseSize(entry.width, entry.height);
  }

  get values() {
    return Object.fromEntries(Object.entries(this.fields).map(([name, field]) => [name, field.value]));
  }

  set values(values) {
    for (const [name, value] of Object.entries(values)) if (name !== "size" && this.fields[name]) this.fields[name].value = value;
    this.refresh(values.size);
  }

  /** The body of a request, without references. Throws what cannot be asked for. */
  body() {
    const { fields } = this;
    const body = {
      prompt: fields.prompt.value.trim(), seed: whole(fields.seed, "seed"), num_images: Number(fields.variations.value),
      num_inference_steps: whole(fields.steps, "steps"), output_format: fields.format.value,
    };
    if (!this.able.is_distilled) {
      if (fields.guidance.value.trim()) body.guidance = Number(fields.guidance.value);
      if (fields.negative.value.trim()) body.negative_prompt = fields.negative.value.trim();
    }
    if (!body.prompt) throw new api.Refused(422, "Say what to draw or to change.", "prompt");
    if (fields.size.value === "custom") {
      Object.assign(body, { width: whole(fields.width, "width"), height: whole(fields.height, "height") });
    } else if (fields.size.value) [body.width, body.height] = fields.size.value.split("x").map(Number);
    return body;
  }

  /** Shows an error beside the field that it names; null: none. */
  complain(error) {
    byId("error").textContent = error?.message ?? "";
    byId("error").hidden = !error;
    for (const field of Object.values(this.fields)) field.removeAttribute("aria-invalid");
    const field = this.fields[FIELD_OF[error?.field] ?? error?.field];
    if (!field) return;
    field.closest("details")?.setAttribute("open", "");
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", "error");
    field.focus();
  }
}

function whole(field, name) {
  const text = field.value.trim();
  if (!text) return undefined;
  if (!/^\d{1,15}$/.test(text)) {
    throw new api.Refused(422, `${name}: ${text.slice(0, 40)} is not a whole number; give one, or leave it empty`, name);
  }
  return Number(text);
}
