// The card of a run: its pictures, how it was drawn, and what can be done with it.

import { announce, h, percent, plural, seconds, size, whilePressed } from "./dom.js";
import * as api from "./api.js";
import { duration } from "./keep.js";

const ENDINGS = { png: "png", jpeg: "jpg", webp: "webp" };

export class Card {
  element = h("li", { className: "card", tabIndex: -1 });
  watched = null; // what ends the watching

  /** `act`: cancel(), remove(), gone() (a picture is no longer there), countsDown(), tell(name, detail). */
  constructor(entry, act) {
    this.entry = entry;
    this.act = act;
    this.element.dataset.id = entry.id;
    this.#build();
  }

  /** Shows what has become of the run; one that has ended stays as it is. */
  show(entry) {
    if (this.entry.status !== "pending") return;
    this.entry = entry;
    if (entry.status === "pending") this.#advance(); else this.#build();
  }

  cancelling(on) {
    this.cancel.disabled = on;
    this.cancel.textContent = on ? "Cancelling …" : "Cancel";
  }

  /** The files of its results that are still kept: {path, name, seed}. */
  results() {
    return resultsOf(this.entry);
  }

  /** Says how long its results are kept. */
  tick() {
    if (!this.left) return;
    const seconds = this.entry.result.expires - Date.now() / 1000;
    const text = seconds <= 0 ? "" : ` · deleted in ${duration(seconds)}`;
    if (this.left.textContent !== text) this.left.textContent = text;
    if (seconds <= 0 && this.element.querySelector("button.picture")) this.#build();
  }

  /** What was edited, as a picture to compare: the canvas as its caller has it, else image 1. Null: nothing was. */
  get before() {
    const { id, controls, num_references: count } = this.entry;
    if (controls?.canvas) return `${id}/canvas`;
    return count ? `${id}/reference/1` : null;
  }

  /** Its pictures to compare: [{id, group, name, path or url, margins}]; `margins`: it is a part of its run's results. */
  pictures() {
    const { entry } = this, group = entry.prompt.length > 60 ? `${entry.prompt.slice(0, 57)} …` : entry.prompt;
    const margins = Array.isArray(entry.controls?.expand) ? entry.controls.expand : null;
    const found = this.results().map(({ path, seed }, i) => ({ id: `${entry.id}/${i + 1}`, group, name: `result, seed ${seed}`, url: path }));
    const add = (id, name, file) => found.push({
      id: `${entry.id}/${id}`, group, name, path: `/v1/jobs/${entry.id}/${file}`, margins: `${entry.id}/${id}` === this.before ? margins : null,
    });
    if (entry.controls?.canvas) add("canvas", "image 1 as it was", "canvas.png");
    if (this.results().length) entry.result.limner.preserved?.forEach(({ map }, i) => { if (map) add(`map/${i + 1}`, `what picture ${i + 1} changed, in white`, `maps/${i + 1}.png`); });
    for (let n = 1; n <= entry.num_references; n += 1) add(`reference/${n}`, `reference, image ${n}`, `references/${n}.png`);
    return found;
  }

  #build() {
    const { entry } = this;
    const kept = this.element.contains(document.activeElement);
    this.element.className = `card ${entry.status}`;
    this.element.replaceChildren(
      h("div", { className: "row head" },
        h("h3", { textContent: entry.prompt }),
        h("time", { className: "muted small", dateTime: new Date(entry.created * 1000).toISOString(), textContent: when(entry.created) })),
      entry.status === "pending" ? this.#running() : entry.status === "ready" ? this.#pictures() : this.#failed(),
      this.#foot());
    this.tick();
    if (kept) this.element.focus(); // what had the focus is gone
    if (entry.status === "pending") this.#advance();
  }

  #running() {
    const { entry } = this;
    this.previews = Array.from({ length: entry.num_images }, (_, i) => {
      const picture = h("div", { className: "picture waiting" });
      picture.style.aspectRatio = `${entry.width} / ${entry.height}`;
      return { picture, figure: h("figure", {}, picture, h("figcaption", {}, h("span", { className: "muted small", textContent: `seed ${entry.seeds[i]}` }))) };
    });
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
    this.step = h("span", { className: "small" });
    this.cancel = h("button", { type: "button", textContent: "Cancel", className: "cancel", onclick: () => this.act.cancel() });
    return h("div", {},
      h("div", { className: `pictures of-${Math.min(entry.num_images, 4)}` }, ...this.previews.map(({ figure }) => figure)),
      h("div", { className: "row progress" }, this.bar, this.step, this.cancel));
  }

  #advance() {
    const { entry } = this, { state, step, num_steps: steps } = entry.details ?? {};
    this.bar.value = entry.progress ?? 0;
    const text = state !== "running" ? "Waiting its turn" : step ? `Step ${step} of ${steps}`
      : entry.num_references ? "Reading references" : "Starting";
    if (this.step.textContent !== text) {
      this.step.textContent = text;
      announce(text);
    }
    (entry.preview?.images ?? []).forEach((source, i) => {
      const { picture } = this.previews[i];
      let image = picture.querySelector("img");
      if (!image) {
        image = h("img", { className: "preview", alt: `Preview of picture ${i + 1}` });
        picture.replaceChildren(image);
        picture.classList.remove("waiting");
      }
      image.src = source;
    });
  }

  #pictures() {
    const { entry } = this, results = this.results(), count = entry.result.samples.length;
    const figures = results.length ? results.map((result, i) => this.#picture(result, i + 1))
      : entry.seeds.map((seed) => h("figure", {}, gone(), h("figcaption", {}, this.#seed(seed))));
    return h("div", { className: `pictures of-${Math.min(count, 4)}` }, ...figures);
  }

  #picture({ path, name, seed }, number) {
    const { entry, before } = this, id = `${entry.id}/${number}`;
    const compare = () => this.act.tell("compare", { result: id, before });
    const image = h("img", { src: path, alt: `${entry.prompt}, seed ${seed}`, loading: "lazy", width: entry.width, height: entry.height });
    const open = h("button", { type: "button", className: "picture", title: "Compare", onclick: compare }, image);
    const tools = h("div", { className: "tools" },
      h("a", { className: "button", href: path, download: name, textContent: "Save", title: "Download the file of the server", "aria-label": `Save picture ${number}` }),
      h("button", { type: "button", textContent: "As reference", title: "Use this result as a reference", onclick: () => this.act.tell("reference", { path, name }) }),
      h("button", { type: "button", textContent: "Compare", onclick: compare }),
      before ? this.#hold(open, number) : null);
    image.addEventListener("error", () => {
      open.replaceWith(gone());
      tools.remove();
      this.act.gone();
    }, { once: true });
    return h("figure", {}, open, h("figcaption", {}, this.#seed(seed), tools));
  }

  /** A button that shows what the picture was made from while it is pressed. */
  #hold(open, number) {
    const button = h("button", { type: "button", className: "hold", textContent: "Before", title: "Hold to see what it was made from", "aria-label": `Before picture ${number}` });
    const shown = h("img", { className: "was", alt: "", hidden: true });
    whilePressed(button, async (on) => {
      shown.hidden = !on;
      if (!on || shown.src) return;
      const { path, margins } = this.pictures().find(({ id }) => id === this.before);
      if (margins) within(shown, margins, this.entry);
      shown.src = await api.pictureURL(path);
      open.append(shown);
    });
    return button;
  }

  #seed(seed) {
    return h("button", {
      type: "button", className: "seed small", title: "Use this seed", textContent: `seed ${seed}`, "aria-label": `Use seed ${seed}`,
      onclick: () => this.act.tell("seed", seed),
    });
  }

  #failed() {
    const { entry } = this;
    return h("p", { className: entry.status === "cancelled" ? "muted" : "error" }, h("strong", { textContent: inWords.status(entry) }), ` ${inWords.reason(entry)}`);
  }

  #foot() {
    const { entry } = this;
    const thumbs = Array.from({ length: entry.num_references }, (_, i) => {
      const image = h("img", { alt: `image ${i + 1}`, title: `image ${i + 1}`, width: 36, height: 36 });
      api.pictureURL(`/v1/jobs/${entry.id}/references/${i + 1}.png`).then((url) => { image.src = url; }, () => image.remove());
      return image;
    });
    const told = entry.result?.limner, kept = inWords.references(entry);
    const hit = ["memory", "disk", "remote"].includes(told?.reference_cache);
    const meta = [
      size([entry.width, entry.height]), plural(entry.num_inference_steps, "step"), ...inWords.controls(entry),
      told ? `drawn in ${seconds(told.timings.total)}` : "",
    ];
    this.left = entry.result && this.act.countsDown() ? h("span", { className: "left" }) : null;
    const warnings = (told?.warnings ?? []).map((text) => h("p", { className: "small error warning", textContent: text.replace("GET /v1/model-card", "click the model's name") }));
    return h("div", { className: "foot" },
      ...warnings,
      thumbs.length ? h("div", { className: "thumbs" }, ...thumbs) : null,
      h("p", { className: "small muted" }, meta.filter(Boolean).join(" · "), this.left,
        kept ? h("span", { className: `cache ${hit ? "hit" : ""}`, textContent: kept }) : null),
      h("div", { className: "tools" },
        entry.num_references ? h("button", { type: "button", className: "reuse", textContent: "Use references", onclick: () => this.act.tell("reuse", { entry, all: false }) }) : null,
        h("button", { type: "button", className: "again", textContent: "Use all settings", onclick: () => this.act.tell("reuse", { entry, all: true }) }),
        entry.status === "pending" ? null : h("button", { type: "button", className: "delete", textContent: "Delete", onclick: () => this.act.remove() })));
  }
}

/** The files of a run's results that are still kept: {path, name, seed}. */
export function resultsOf({ result, prompt, output_format: format, seeds }) {
  if (!result || result.expires * 1000 <= Date.now()) return [];
  return result.samples.map((url, i) => {
    const place = new URL(url);
    // of this server, whatever name it goes by
    return { path: place.pathname + place.search, name: `${slug(prompt)}-${seeds[i]}.${ENDINGS[format]}`, seed: seeds[i] };
  });
}

const gone = () => h("div", { className: "picture gone muted small", textContent: "No longer kept by the server" });

/** Puts a picture where it stands in one that has margins around it. */
export function within(image, [left, top, right, bottom], { width, height }) {
  Object.assign(image.style, {
    left: `${(left / width) * 100}%`, top: `${(top / height) * 100}%`,
    width: `${((width - left - right) / width) * 100}%`, height: `${((height - top - bottom) / height) * 100}%`,
  });
}

/** What there is to say of a run, in a few words. */
export const inWords = {
  /** Whether its references had to be computed. */
  references({ result }) {
    const told = result?.limner;
    switch (told?.reference_cache) {
      case "miss": return `References kept: computed in ${seconds(told.timings.references)}`;
      case "memory": return `References found in memory, ${seconds(told.seconds_saved)} saved`;
      case "disk": return `References found on disk, ${seconds(told.seconds_saved)} saved`;
      case "remote": return `References found in the shared store, ${seconds(told.seconds_saved)} saved`;
      default: return "";
    }
  },

  /** What of image 1 was repainted, and how. */
  controls({ controls, result }) {
    const { canvas, preserved } = result?.limner ?? {}, told = [];
    if (canvas) told.push(`${percent(canvas.share)} drawn anew`);
    else if (controls?.mask) told.push("a part drawn anew");
    if (controls?.expand) told.push("extended");
    if (controls?.strength) told.push(`strength ${percent(controls.strength)}`);
    if (preserved) told.push(`${preserved.map(({ share_kept: share }) => percent(share)).join(", ")} left alone`);
    else if (controls?.preserve) told.push("the rest left alone");
    if (controls?.reference_weights) told.push(`weights ${controls.reference_weights.map((row) => [row].flat().join(", ")).join(Array.isArray(controls.reference_weights[0]) ? "; " : ", ")}`);
    if (controls?.reference_guidance) told.push(`likeness ${controls.reference_guidance}`);
    const asked = controls?.loras && Object.entries(controls.loras).map(([name, strength]) => ({ name, strength }));
    const loras = result?.limner?.loras ?? asked ?? [];
    told.push(...loras.map(({ name, strength }) => `${name} ×${strength}`));
    if (asked && !loras.length) told.push("no LoRA");
    return told;
  },

  status({ status }) {
    return { error: "Failed.", cancelled: "Cancelled.", request_moderated: "Refused.", content_moderated: "Result withheld." }[status] ?? status;
  },

  reason({ status, details }) {
    return status === "cancelled" ? "" : details?.reason ?? details?.error ?? "";
  },
};

function when(created) {
  const date = new Date(created * 1000);
  const sameDay = date.toDateString() === new Date().toDateString();
  return date.toLocaleString(undefined, sameDay ? { hour: "2-digit", minute: "2-digit" } : { dateStyle: "medium", timeStyle: "short" });
}

function slug(prompt) {
  return prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 48) || "picture";
}
