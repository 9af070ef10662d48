// The runs: a card for each job of the server, watched until it ends. Knows nothing of the form; what a card offers is
// told to its owner as "reuse", "seed", "reference", "compare" and "problem".

import { announce, byId, plural } from "./dom.js";
import * as api from "./api.js";
import { Card, inWords, resultsOf } from "./card.js";

const PAGE = 50; // runs that are shown at first, and again by "older"
const AGAIN = [500, 1000, 2000, 4000]; // ms before a broken stream is opened again

export class Jobs extends EventTarget {
  cards = new Map(); // id to Card, in no order
  hasOlder = false; // whether the server may know more
  countsDown = true; // whether results go with time
  resultsOf = resultsOf;
  #feed = byId("feed");

  async refresh() {
    const { data } = await api.get(`/v1/jobs?limit=${PAGE}`);
    if (!this.cards.size) this.hasOlder = data.length === PAGE;
    for (const entry of data.toReversed()) this.show(entry);
    this.dispatchEvent(new Event("change"));
  }

  /** Shows the runs before those that are shown. */
  async older() {
    const oldest = this.#newest.at(-1)?.entry.created ?? "";
    const { data } = await api.get(`/v1/jobs?limit=${PAGE}&before=${oldest}`);
    this.hasOlder = data.length === PAGE;
    for (const entry of data) this.show(entry);
    this.cards.get(data[0]?.id)?.element.focus();
    this.dispatchEvent(new Event("change"));
  }

  /** Takes away all runs that have ended; the server has forgotten them. */
  clear() {
    for (const card of [...this.cards.values()]) if (card.entry.status !== "pending") this.#drop(card);
    this.hasOlder = false;
    this.dispatchEvent(new Event("change"));
  }

  #drop(card) {
    card.element.remove();
    this.cards.delete(card.entry.id);
  }

  async #delete(card) {
    if (!confirm("Delete this run with its pictures?")) return;
    try {
      await api.remove(`/v1/jobs/${card.entry.id}?forget=true`);
    } catch (error) {
      if (error.status !== 404) {
        this.dispatchEvent(new CustomEvent("problem", { detail: error }));
        return;
      }
    }
    const next = card.element.nextElementSibling ?? card.element.previousElementSibling ?? byId("results");
    this.#drop(card);
    next.focus();
    announce("Run deleted");
    this.dispatchEvent(new Event("change"));
  }

  /** Shows a job as it is now, and watches it if it has not ended. */
  show(entry) {
    let card = this.cards.get(entry.id);
    if (!card) {
      card = new Card(entry, {
        cancel: () => this.#cancel(card),
        remove: () => this.#delete(card),
        countsDown: () => this.countsDown,
        gone: () => this.dispatchEvent(new Event("change")),
        tell: (name, detail) => this.dispatchEvent(new CustomEvent(name, { detail })),
      });
      this.cards.set(entry.id, card);
      const after = [...this.#feed.children].find((e) => this.cards.get(e.dataset.id).entry.created <= entry.created);
      this.#feed.insertBefore(card.element, after ?? null);
    } else card.show(entry);
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
    const { entry } = card;
    announce(entry.status === "ready" ? `${plural(entry.num_images, "picture")} ready. ${inWords.references(entry)}`
      : `${inWords.status(entry)} ${inWords.reason(entry)}`);
    this.dispatchEvent(new Event("change"));
  }

  async #cancel(card) {
    card.cancelling(true);
    try {
      this.show(await api.remove(`/v1/jobs/${card.entry.id}`));
    } catch (error) {
      card.cancelling(false);
      announce(error.message);
    }
  }

  get #newest() {
    return [...this.cards.values()].sort((a, b) => b.entry.created - a.entry.created);
  }

  /** The pictures of all runs that are still kept, the newest run first. */
  pictures() {
    return this.#newest.flatMap((card) => card.pictures());
  }
}
