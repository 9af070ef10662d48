// What becomes of pictures: all of them saved as a ZIP, runs deleted, and how long the server keeps them.

import { announce, byId, plural } from "./dom.js";
import * as api from "./api.js";
import { Zip } from "./zip.js";

const PAGE = 200; // runs in one answer
const FOR_GOOD = 1e8; // seconds from which on nobody counts down

export class Keep {
  #able = { keep_seconds: 600, keep_bytes: null };

  /** `jobs` are the cards; `complain(error)` shows what went wrong. */
  constructor(jobs, complain) {
    Object.assign(this, { jobs, complain });
    byId("save-all").addEventListener("click", () => this.#saveAll());
    byId("clear-all").addEventListener("click", () => this.#clear());
    byId("older").addEventListener("click", () => jobs.older().catch(complain));
    jobs.addEventListener("change", () => this.refresh());
    setInterval(() => this.refresh(), 1000);
  }

  allow(able) {
    this.#able = able;
    this.jobs.countsDown = able.keep_seconds < FOR_GOOD;
    this.refresh();
  }

  refresh() {
    const { jobs } = this, { keep_seconds: seconds, keep_bytes: bytes } = this.#able;
    const ended = [...jobs.cards.values()].filter(({ entry }) => entry.status !== "pending");
    byId("keeping").hidden = !jobs.cards.size;
    byId("older").hidden = !jobs.hasOlder;
    byId("clear-all").disabled = !ended.length;
    const ends = [];
    for (const card of ended) {
      card.tick();
      if (card.results().length) ends.push(card.entry.result.expires * 1000 - Date.now());
    }
    byId("save-all").disabled = !ends.length;
    const soonest = Math.min(...ends);
    const room = bytes ? `, the oldest go when they have more than ${amount(bytes)}` : "";
    const text = jobs.countsDown
      ? `The server keeps pictures for ${duration(seconds)}${room}.${ends.length ? ` The next goes in ${duration(soonest / 1000)}.` : ""}`
      : `Pictures are kept on this server${room}.`;
    if (byId("kept").textContent !== text) byId("kept").textContent = text;
  }

  async #saveAll() {
    const button = byId("save-all"), label = button.textContent;
    button.disabled = true;
    try {
      const zip = new Zip(), entries = await this.#all();
      const files = entries.flatMap((entry) => this.jobs.resultsOf(entry).map((result) => ({ ...result, created: entry.created })));
      for (const [i, { path, name, created }] of files.entries()) {
        button.textContent = `Saving ${i + 1} of ${files.length} …`;
        const file = await api.blob(path).catch((error) => { if (error.status !== 404) throw error; }); // gone meanwhile
        if (file) await zip.add(name, file, new Date(created * 1000));
      }
      const url = URL.createObjectURL(zip.blob()), link = document.createElement("a");
      Object.assign(link, { href: url, download: `limner-${new Date().toISOString().slice(0, 10)}.zip` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
      announce(`${plural(zip.count, "picture")} saved`);
    } catch (error) {
      this.complain(error);
    } finally {
      button.textContent = label;
      this.refresh();
    }
  }

  /** All runs that the server knows, also those that are not shown. */
  async #all() {
    const found = [];
    for (let before = "";;) {
      const { data } = await api.get(`/v1/jobs?limit=${PAGE}${before}`);
      found.push(...data);
      if (data.length < PAGE) return found;
      before = `&before=${data.at(-1).created}`;
    }
  }

  async #clear() {
    if (!confirm("Delete all runs with their pictures? References that you keep stay.")) return;
    try {
      const { deleted } = await api.remove("/v1/jobs");
      this.jobs.clear();
      announce(`${plural(deleted, "run")} deleted`);
      byId("results").focus();
    } catch (error) {
      this.complain(error);
    }
  }
}

/** Seconds as people count them. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 120) return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")} min`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min`;
  return whole < 172800 ? `${Math.floor(whole / 3600)} h` : `${Math.floor(whole / 86400)} days`;
}

function amount(bytes) {
  return bytes >= 2 ** 30 ? `${+(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.max(1, Math.round(bytes / 2 ** 20))} MiB`;
}
