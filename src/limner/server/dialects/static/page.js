// The page put together: the form, what it asks of the server, and what becomes of a click on a card.

import { announce, byId, h, size } from "./dom.js";
import * as api from "./api.js";
import { Compare } from "./compare.js";
import { Jobs } from "./jobs.js";
import { References } from "./references.js";

const DRAFT = "limner.draft";
const MAX_VARIATIONS = 8;
const SHAPES = [[1, 1], [5, 3], [3, 5]];
const SAMPLES = ["cat", "beach", "dog", "meadow", "duck", "rocket"];
const EXAMPLES = [
  { prompt: "use the background of image 2", samples: ["cat", "beach"] },
  { prompt: "put the dog from image 2 into image 1 on the right", samples: ["meadow", "dog"] },
  { prompt: "put the sticker in the snow", samples: ["duck"] },
  { prompt: "the rocket over a gradient from purple to pink", samples: ["rocket"] },
];

const fields = Object.fromEntries(
  ["prompt", "size", "width", "height", "variations", "seed", "steps", "guidance", "negative", "format"].map((name) => [name, byId(name)]));
const FIELD_OF = { num_images: "variations", num_inference_steps: "steps", guidance: "guidance", negative_prompt: "negative", output_format: "format" };
const references = new References();
const jobs = new Jobs();
let able = { default_size: [1024, 1024], grid: 16, max_images: MAX_VARIATIONS };

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

// the form

function sizes() {
  if (able.sizes?.length) return able.sizes;  // those that the model has learned to draw
  const [width, height] = able.default_size, area = width * height, { grid } = able;
  return SHAPES.map(([w, h_]) => [Math.sqrt(area * w / h_), Math.sqrt(area * h_ / w)].map((x) => Math.max(grid, Math.round(x / grid) * grid)));
}

function fillSizes(chosen = fields.size.value) {
  const first = references.items.find((item) => !item.problem)?.report?.processed_size;
  const auto = references.items.length ? `As image 1${first ? ` (${size(first)})` : ""}` : `The model's (${size(able.default_size)})`;
  fields.size.replaceChildren(
    h("option", { value: "", textContent: auto }),
    ...sizes().map((pair) => h("option", { value: pair.join("x"), textContent: size(pair) })),
    h("option", { value: "custom", textContent: "Other …" }));
  fields.size.value = [...fields.size.options].some(({ value }) => value === chosen) ? chosen : "";
  byId("custom").hidden = fields.size.value !== "custom";
}

function chooseSize(width, height) {
  fillSizes(`${width}x${height}`);
  if (fields.size.value) return;
  fillSizes("custom");
  [fields.width.value, fields.height.value] = [width, height];
}

function whole(field, name) {
  const text = field.value.trim();
  if (!text) return undefined;
  if (!/^\d{1,15}$/.test(text)) {
    throw new api.Refused(422, `${name}: ${text.slice(0, 40)} is not a whole number; give one, or leave it empty`, name);
  }
  return Number(text);
}

function asked() {
  const body = {
    prompt: fields.prompt.value.trim(), seed: whole(fields.seed, "seed"), num_images: Number(fields.variations.value),
    num_inference_steps: whole(fields.steps, "steps"), output_format: fields.format.value,
  };
  if (!able.is_distilled) {
    if (fields.guidance.value.trim()) body.guidance = Number(fields.guidance.value);
    if (fields.negative.value.trim()) body.negative_prompt = fields.negative.value.trim();
  }
  if (!body.prompt) throw new api.Refused(422, "Say what to draw or to change.", "prompt");
  if (fields.size.value === "custom") {
    Object.assign(body, { width: whole(fields.width, "width"), height: whole(fields.height, "height") });
  } else if (fields.size.value) [body.width, body.height] = fields.size.value.split("x").map(Number);
  return body;
}

function complain(error) {
  byId("error").textContent = error?.message ?? "";
  byId("error").hidden = !error;
  for (const field of Object.values(fields)) field.removeAttribute("aria-invalid");
  const field = fields[FIELD_OF[error?.field] ?? error?.field];
  if (!field) return;
  field.closest("details")?.setAttribute("open", "");
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-errormessage", "error");
  field.focus();
}

async function draw() {
  const button = byId("draw");
  if (button.getAttribute("aria-busy") === "true") return;
  button.setAttribute("aria-busy", "true");
  complain(null);
  try {
    const body = asked(), handle = await references.handle({ focus: true });
    const { id } = await api.post("/v1/edit", handle ? { ...body, references: handle } : body);
    const card = jobs.show(await api.get(`/v1/jobs/${id}`));
    settle();
    card.element.scrollIntoView({ block: "nearest" });
  } catch (error) {
    complain(error);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

async function save() {
  const values = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value]));
  const names = references.items.map((item) => item.name);
  const handle = await references.handle().catch(() => null);
  sessionStorage.setItem(DRAFT, JSON.stringify({ values, names, handle }));
}

async function restore() {
  const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
  if (!draft) return;
  for (const [name, value] of Object.entries(draft.values)) if (name !== "size") fields[name].value = value;
  if (draft.handle) {
    await takeHandle(draft.handle, draft.names).catch(() => announce("The references of before are no longer kept"));
  }
  fillSizes(draft.values.size);
}

async function takeHandle(handle, names) {
  const told = await api.get(`/v1/references/${handle}`);
  await references.replace({
    count: told.references.length, reports: told.references, handle, names, path: (n) => `/v1/references/${handle}/${n}.png`,
  });
}

async function reuse({ entry, all }) {
  complain(null);
  try {
    const known = entry.references && await takeHandle(entry.references).then(() => true, () => false);
    if (!known && entry.num_references) {
      await references.replace({
        count: entry.num_references, reports: entry.result?.limner?.references, path: (n) => `/v1/jobs/${entry.id}/references/${n}.png`,
      });
    } else if (!known && all) references.clear();
  } catch (error) {
    complain(error);
    return;
  }
  if (all) {
    fields.prompt.value = entry.prompt;
    fields.seed.value = entry.seeds[0];
    fields.variations.value = Math.min(entry.num_images, MAX_VARIATIONS);
    fields.steps.value = entry.num_inference_steps;
    fields.guidance.value = entry.guidance_scale ?? able.guidance_scale;
    fields.negative.value = entry.negative_prompt ?? "";
    fields.format.value = entry.output_format;
    chooseSize(entry.width, entry.height);
  }
  byId("composer").scrollIntoView({ block: "nearest" });
  fields.prompt.focus();
  save();
}

// samples and examples

const sampleFile = async (name) => new File([await api.blob(`/static/samples/${name}.png`)], `${name}.png`, { type: "image/png" });
const sampleImage = (name) => h("img", { src: `/static/samples/${name}.png`, alt: name, width: 128, height: 128, loading: "lazy" });

function offerSamples() {
  byId("samples").querySelector("ul").append(...SAMPLES.map((name) => h("li", {}, h("button", {
    type: "button", title: `Add ${name}`, "aria-label": `Add the sample ${name}`,
    onclick: async () => references.add([await sampleFile(name)]),
  }, sampleImage(name)))));
  byId("samples").hidden = false;
  byId("examples").append(...EXAMPLES.map(({ prompt, samples }) => h("li", {}, h("button", {
    type: "button",
    onclick: async () => {
      references.clear();
      fields.prompt.value = prompt;
      references.add(await Promise.all(samples.map(sampleFile)));
      await draw();
    },
  }, h("span", { className: "pair" }, ...samples.map(sampleImage)), h("span", { textContent: prompt })))));
}

// what is on the page

function settle() {
  byId("welcome").hidden = jobs.cards.size > 0;
  byId("draw").textContent = references.items.length ? "Edit" : "Draw";
}

function pictures() {
  const found = references.items.filter((item) => !item.problem).map((item, i) => ({
    id: `reference/${i + 1}`, group: "References", name: `image ${i + 1}: ${item.name}`, url: item.url,
  }));
  const newest = [...jobs.cards.values()].sort((a, b) => b.entry.created - a.entry.created);
  for (const { entry } of newest) {
    const group = entry.prompt.length > 60 ? `${entry.prompt.slice(0, 57)} …` : entry.prompt;
    if (entry.result && entry.result.expires * 1000 > Date.now()) entry.result.samples.forEach((url, i) => {
      const place = new URL(url);
      found.push({ id: `${entry.id}/${i + 1}`, group, name: `result, seed ${entry.seeds[i]}`, url: place.pathname + place.search });
    });
    for (let n = 1; n <= entry.num_references; n += 1) {
      found.push({ id: `${entry.id}/reference/${n}`, group, name: `reference, image ${n}`, path: `/v1/jobs/${entry.id}/references/${n}.png` });
    }
  }
  return found;
}

const compare = new Compare(pictures);
jobs.addEventListener("compare", ({ detail }) => compare.open(detail, `${detail.split("/")[0]}/reference/1`));
jobs.addEventListener("reuse", ({ detail }) => reuse(detail));
jobs.addEventListener("change", settle);
jobs.addEventListener("seed", ({ detail }) => {
  fields.seed.value = detail;
  fields.seed.focus();
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
  fillSizes();
  settle();
  save();
});

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
byId("composer").addEventListener("change", save);
byId("composer").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); draw(); }
});
fields.size.addEventListener("change", () => {
  fillSizes();
  if (fields.size.value === "custom" && !fields.width.value) [fields.width.value, fields.height.value] = able.default_size;
});
byId("choose").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", ({ target }) => { references.add(target.files); target.value = ""; });

const carriesFiles = (event) => [...event.dataTransfer.types].includes("Files");
for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!carriesFiles(event)) return;
  event.preventDefault();
  references.add(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return; // words go where the cursor is
  event.preventDefault();
  references.add(event.clipboardData.files);
});

byId("theme").value = document.documentElement.dataset.theme;
byId("theme").addEventListener("change", ({ target }) => {
  document.documentElement.dataset.theme = target.value;
  localStorage.setItem("limner.theme", target.value);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) jobs.refresh().catch(complain); });

async function start() {
  for (let n = 1; n <= MAX_VARIATIONS; n += 1) fields.variations.append(h("option", { value: n, textContent: n }));
  offerSamples();
  fillSizes();
  try {
    able = await api.get("/v1/capabilities");
    byId("model").textContent = able.model;
    byId("model").title = `${able.references_attention} references, ${able.is_distilled ? "distilled" : "base, drawn with guidance"}`;
    fields.steps.value = able.num_inference_steps;
    fields.guidance.value = able.guidance_scale;
    for (const label of document.querySelectorAll(".guided")) label.hidden = able.is_distilled;
    for (const option of [...fields.variations.options]) if (option.value > able.max_images) option.remove();
    for (const field of [fields.width, fields.height]) field.step = able.grid;
    await restore();
    fillSizes();
    await jobs.refresh();
  } catch (error) {
    complain(error);
  }
  settle();
  document.documentElement.dataset.ready = "";
}

start();
