// The runs: a card for each job of the server, watched until it ends. Knows nothing of the form; what a card offers is
// told to its owner as "reuse", "seed", "reference" and "compare".

import { announce, byId, h, plural, seconds, size } from "./dom.js";
import * as api from "./api.js";

const AGAIN = [500, 1000, 2000, 4000]; // ms before a broken stream is opened again
const ENDINGS = { png: "png", jpeg: "jpg", webp: "webp" };

export class Jobs extends EventTarget {
  cards = new Map(); // id to {entry, element, ...}, in no order
  #feed = byId("feed");

  async refresh() {
    const { data } = await api.get("/v1/jobs?limit=50");
    for (const entry of data.toReversed()) this.show(entry);
    this.dispatchEvent(new Event("change"));
  }

  /** Shows a job as it is now, and watches it if it has not ended. */
  show(entry) {
    let card = this.cards.get(entry.id);
    if (!card) {
      card = { entry, element: h("li", { className: "card", tabIndex: -1 }) };
      card.element.dataset.id = entry.id;
      this.cards.set(entry.id, card);
      const after = [...this.#feed.children].find((e) => this.cards.get(e.dataset.id).entry.created <= entry.created);
      this.#feed.insertBefore(card.element, after ?? null);
      this.#build(card);
    } else if (card.entry.status === "pending") {
      const ended = entry.status !== "pending";
      card.entry = entry;
      if (ended) this.#build(card); else this.#advance(card);
    }
    if (card.entry.status === "pending" && !card.watched) this.#watch(card);
    return card;
  }

  /** Follows a job to its end; a connection that breaks is made again. */
  async #watch(card) {
    card.watched = new AbortController();
    const path = `/v1/jobs/${card.entry.id}`;
    for (let tries = 0; card.entry.status === "pending"; tries += 1) {
      try {
        for await (const entry of api.events(`${path}/events`, { signal: card.watched.signal })) {
          tries = 0;
          this.show(entry);
        }
        if (card.entry.status === "pending") this.show(await api.get(path));
      } catch (error) {
        if (error.name === "AbortError") return;
        if (error.status === 404) {
          this.show({ ...card.entry, status: "error", details: { error: error.message } });
          break;
        }
      }
      if (card.entry.status !== "pending") break;
      await new Promise((resolve) => setTimeout(resolve, AGAIN[Math.min(tries, AGAIN.length - 1)]));
    }
    this.#say(card);
    this.dispatchEvent(new Event("change"));
  }

  #say({ entry }) {
    if (entry.status === "ready") {
      announce(`${plural(entry.num_images, "picture")} ready. ${references(entry)}`);
    } else announce(`${title(entry.status)}. ${reason(entry)}`);
  }

  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  async #cancel(card) {
    card.cancel.disabled = true;
    card.cancel.textContent = "Cancelling …";
    try {
      this.show(await api.remove(`/v1/jobs/${card.entry.id}`));
    } catch (error) {
      card.cancel.disabled = false;
      card.cancel.textContent = "Cancel";
      announce(error.message);
    }
  }

  // cards

  #build(card) {
    const { entry } = card;
    const kept = card.element.contains(document.activeElement);
    card.element.className = `card ${entry.status}`;
    card.element.replaceChildren(
      h("div", { className: "row head" },
        h("h3", { textContent: entry.prompt }),
        h("time", { className: "muted small", dateTime: new Date(entry.created * 1000).toISOString(), textContent: when(entry.created) })),
      entry.status === "pending" ? this.#running(card) : entry.status === "ready" ? this.#pictures(card) : this.#failed(card),
      this.#foot(card));
    if (kept) card.element.focus(); // what had the focus is gone
    if (entry.status === "pending") this.#advance(card);
  }

  #running(card) {
    const { entry } = card;
    card.previews = Array.from({ length: entry.num_images }, (_, i) => {
      const picture = h("div", { className: "picture waiting" });
      picture.style.aspectRatio = `${entry.width} / ${entry.height}`;
      return { picture, figure: h("figure", {}, picture, h("figcaption", {}, h("span", { className: "muted small", textContent: `seed ${entry.seeds[i]}` }))) };
    });
    card.bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
    card.step = h("span", { className: "small" });
    card.cancel = h("button", { type: "button", textContent: "Cancel", className: "cancel", onclick: () => this.#cancel(card) });
    return h("div", {},
      h("div", { className: `pictures of-${Math.min(entry.num_images, 4)}` }, ...card.previews.map(({ figure }) => figure)),
      h("div", { className: "row progress" }, card.bar, card.step, card.cancel));
  }

  #advance(card) {
    const { entry } = card, { state, step, num_steps: steps } = entry.details ?? {};
    card.bar.value = entry.progress ?? 0;
    const text = state !== "running" ? "Waiting its turn" : step ? `Step ${step} of ${steps}`
      : entry.num_references ? "Reading references" : "Starting";
    if (card.step.textContent !== text) {
      card.step.textContent = text;
      announce(text);
    }
    (entry.preview?.images ?? []).forEach((source, i) => {
      const { picture } = card.previews[i];
      let image = picture.querySelector("img");
      if (!image) {
        image = h("img", { className: "preview", alt: `Preview of picture ${i + 1}` });
        picture.replaceChildren(image);
        picture.classList.remove("waiting");
      }
      image.src = source;
    });
  }

  #pictures(card) {
    const { entry } = card, { samples, seeds, expires } = entry.result;
    const figures = samples.map((url, i) => {
      const place = new URL(url);
      const path = place.pathname + place.search; // of this server, whatever name it goes by
      const name = `${slug(entry.prompt)}-${seeds[i]}.${ENDINGS[entry.output_format]}`;
      const image = h("img", { src: path, alt: `${entry.prompt}, seed ${seeds[i]}`, loading: "lazy", width: entry.width, height: entry.height });
      const open = h("button", { type: "button", className: "picture", title: "Compare", onclick: () => this.#emit("compare", `${entry.id}/${i + 1}`) }, image);
      const tools = h("div", { className: "tools" },
        h("a", { className: "button", href: path, download: name, textContent: "Save", title: "Download the file of the server", "aria-label": `Save picture ${i + 1}` }),
        h("button", { type: "button", textContent: "As reference", title: "Use this result as a reference", onclick: () => this.#emit("reference", { path, name }) }),
        h("button", { type: "button", textContent: "Compare", onclick: () => this.#emit("compare", `${entry.id}/${i + 1}`) }));
      const seed = h("button", { type: "button", className: "seed small", title: "Use this seed", textContent: `seed ${seeds[i]}`, "aria-label": `Use seed ${seeds[i]}`, onclick: () => this.#emit("seed", seeds[i]) });
      const figure = h("figure", {}, open, h("figcaption", {}, seed, tools));
      const gone = () => {
        open.replaceWith(h("div", { className: "picture gone muted small", textContent: "No longer kept by the server" }));
        tools.remove();
        this.#emit("change");
      };
      if (expires * 1000 <= Date.now()) gone();
      else image.addEventListener("error", gone, { once: true });
      return figure;
    });
    return h("div", { className: `pictures of-${Math.min(samples.length, 4)}` }, ...figures);
  }

  #failed({ entry }) {
    return h("p", { className: entry.status === "cancelled" ? "muted" : "error" }, h("strong", { textContent: title(entry.status) }), ` ${reason(entry)}`);
  }

  #foot(card) {
    const { entry } = card;
    const thumbs = Array.from({ length: entry.num_references }, (_, i) => {
      const image = h("img", { alt: `image ${i + 1}`, title: `image ${i + 1}`, width: 36, height: 36 });
      api.pictureURL(`/v1/jobs/${entry.id}/references/${i + 1}.png`).then((url) => { image.src = url; }, () => image.remove());
      return image;
    });
    const told = entry.result?.limner, cache = told?.reference_cache;
    const hit = ["memory", "disk", "remote"].includes(cache);
    const meta = [size([entry.width, entry.height]), plural(entry.num_inference_steps, "step"), told ? `drawn in ${seconds(told.timings.total)}` : ""];
    const warnings = (told?.warnings ?? []).map((text) => h("p", { className: "small error warning", textContent: text }));
    return h("div", { className: "foot" },
      ...warnings,
      thumbs.length ? h("div", { className: "thumbs" }, ...thumbs) : null,
      h("p", { className: "small muted" }, meta.filter(Boolean).join(" · "),
        references(entry) ? h("span", { className: `cache ${hit ? "hit" : ""}`, textContent: references(entry) }) : null),
      h("div", { className: "tools" },
        entry.num_references ? h("button", { type: "button", className: "reuse", textContent: "Use references", onclick: () => this.#emit("reuse", { entry, all: false }) }) : null,
        h("button", { type: "button", className: "again", textContent: "Use all settings", onclick: () => this.#emit("reuse", { entry, all: true }) })));
  }
}

/** Whether the references of a run had to be computed, in a few words. */
function references(entry) {
  const told = entry.result?.limner;
  switch (told?.reference_cache) {
    case "miss": return `References kept: computed in ${seconds(told.timings.references)}`;
    case "memory": return `References found in memory, ${seconds(told.seconds_saved)} saved`;
    case "disk": return `References found on disk, ${seconds(told.seconds_saved)} saved`;
    case "remote": return `References found in the shared store, ${seconds(told.seconds_saved)} saved`;
    default: return "";
  }
}

function title(status) {
  return { error: "Failed.", cancelled: "Cancelled.", request_moderated: "Refused.", content_moderated: "Result withheld." }[status] ?? status;
}

function reason({ status, details }) {
  return status === "cancelled" ? "" : details?.reason ?? details?.error ?? "";
}

function when(created) {
  const date = new Date(created * 1000);
  const sameDay = date.toDateString() === new Date().toDateString();
  return date.toLocaleString(undefined, sameDay ? { hour: "2-digit", minute: "2-digit" } : { dateStyle: "medium", timeStyle: "short" });
}

function slug(prompt) {
  return prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 48) || "picture";
}
