// The page put together: what it asks of the server, and what becomes of a click on a card.

import { byId } from "./dom.js";
import * as api from "./api.js";
import { Change } from "./change.js";
import { Compare } from "./compare.js";
import { restoreDraft, saveDraft } from "./draft.js";
import { takeDrops } from "./drop.js";
import { Editor } from "./editor.js";
import { Form } from "./form.js";
import { Jobs } from "./jobs.js";
import { Keep } from "./keep.js";
import { Loras } from "./loras.js";
import { Mask } from "./mask.js";
import { Model } from "./model.js";
import { Prompts } from "./prompts.js";
import { References } from "./references.js";
import { offerSamples } from "./samples.js";

const PAUSE = 200; // ms without another step of a slider

const references = new References();
const change = new Change(references, new Editor());
const form = new Form(references, change);
const loras = new Loras();
const jobs = new Jobs();
const complain = (error) => {
  form.complain(error);
  loras.complain(error);
};
const keep = new Keep(jobs, complain);
const model = new Model();
const prompts = new Prompts();
let able = {};

// the key

api.onKeyNeeded((problem) => new Promise((resolve) => {
  const dialog = byId("key"), value = byId("key-value");
  byId("key-problem").textContent = problem;
  byId("key-problem").hidden = !problem;
  value.value = "";
  dialog.returnValue = "";
  dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? value.value.trim() : null), { once: true });
  dialog.showModal();
}));

// a run

async function draw() {
  const button = byId("draw");
  if (button.getAttribute("aria-busy") === "true") return;
  button.setAttribute("aria-busy", "true");
  complain(null);
  try {
    const body = { ...form.body(), ...loras.fields() }, handle = await references.handle({ focus: true });
    Object.assign(body, handle ? { references: handle } : {}, await change.fields(handle));
    const { id } = await api.post("/v1/edit", body);
    prompts.add(body.prompt);
    byId("welcome").open = false;
    const card = jobs.show(await api.get(`/v1/jobs/${id}`));
    settle();
    card.element.scrollIntoView({ block: "nearest" });
  } catch (error) {
    complain(error);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

const save = () => saveDraft({ form, references, change, loras });
let saving = 0;
/** Saves when a slider stands still. */
const saveSoon = () => {
  clearTimeout(saving);
  saving = setTimeout(save, PAUSE);
};

async function takeHandle(handle, names, weights) {
  const told = await api.get(`/v1/references/${handle}`);
  await references.replace({
    count: told.references.length, reports: told.references, handle, names, weights, path: (n) => `/v1/references/${handle}/${n}.png`,
  });
}

async function reuse({ entry, all }) {
  complain(null);
  const path = (name) => `/v1/jobs/${entry.id}/${name}`, asked = entry.controls?.reference_weights;
  const weights = all && Number.isFinite(asked?.[0]) ? asked : undefined; // those of each step have no slider
  try {
    const known = entry.references && await takeHandle(entry.references, null, weights).then(() => true, () => false);
    if (!known && entry.num_references) {
      await references.replace({
        count: entry.num_references, reports: entry.result?.limner?.references, weights, path: (n) => path(`references/${n}.png`),
      });
    } else if (!known && all) references.clear();
    if (all) await change.take({
      controls: entry.controls, canvas: entry.controls?.canvas ? () => api.blob(path("canvas.png")) : null,
      mask: entry.controls?.mask ? () => api.blob(path("mask.png")) : null,
    }, Mask.from);
  } catch (error) {
    complain(error);
    return;
  }
  let missing = [];
  if (all) {
    form.take(entry);
    missing = loras.take(entry);
    model.check();
  }
  byId("composer").scrollIntoView({ block: "nearest" });
  form.fields.prompt.focus();
  if (missing.length) complain(new Error(`The server has no LoRA ${missing.join(", ")} now; the other settings are those of the run.`));
  save();
}

// what is on the page

function settle() {
  if (!jobs.cards.size) byId("welcome").open = true;
  form.refresh();
}

/** All pictures that can be compared: references, and results with what they were made from. */
function pictures() {
  const found = references.items.filter((item) => !item.problem).map((item, i) => ({
    id: `reference/${i + 1}`, group: "References", name: `image ${i + 1}: ${item.name}`, url: item.url,
  }));
  return [...found, ...jobs.pictures()];
}

const compare = new Compare(pictures);
jobs.addEventListener("compare", ({ detail: { result, before } }) => compare.open(result, before));
jobs.addEventListener("reuse", ({ detail }) => reuse(detail));
jobs.addEventListener("change", settle);
jobs.addEventListener("problem", ({ detail }) => complain(detail));
jobs.addEventListener("seed", ({ detail }) => {
  form.fields.seed.value = detail;
  form.fields.seed.focus();
  save();
});
jobs.addEventListener("reference", async ({ detail: { path, name } }) => {
  try {
    const data = await api.blob(path);
    references.add([new File([data], name, { type: data.type })]);
  } catch (error) {
    complain(error);
  }
});
for (const kind of ["change", "report"]) references.addEventListener(kind, () => {
  settle();
  save();
});
references.addEventListener("weigh", saveSoon);
change.addEventListener("change", () => {
  form.refresh();
  save();
});
change.addEventListener("problem", ({ detail }) => complain(detail));

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
byId("composer").addEventListener("change", save);
byId("composer").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); draw(); }
});
byId("choose").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", ({ target }) => { references.add(target.files); target.value = ""; });
takeDrops({ add: (files) => references.add(files), complain, fetches: () => able.fetch_urls });
offerSamples({
  add: (files) => references.add(files),
  example: async (prompt, files) => {
    references.clear();
    form.fields.prompt.value = prompt;
    model.check();
    references.add(files);
    await draw();
  },
});

byId("theme").value = document.documentElement.dataset.theme;
byId("theme").addEventListener("change", ({ target }) => {
  document.documentElement.dataset.theme = target.value;
  localStorage.setItem("limner.theme", target.value);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) jobs.refresh().catch(complain); });

async function start() {
  try {
    able = await api.get("/v1/capabilities");
    for (const part of [form, change, loras, model, keep]) part.allow(able);
    await restoreDraft({ form, references, change, loras, take: takeHandle });
    model.check();
    await jobs.refresh();
    byId("welcome").open = !jobs.cards.size;
  } catch (error) {
    complain(error);
  }
  settle();
  document.documentElement.dataset.ready = "";
}

start();
