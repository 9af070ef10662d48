// One reference: its small picture, its buttons, how much it counts, and what the server did to it or why it refused it.

import { h, size } from "./dom.js";

const MOST = 2; // of a weight; the server takes more
const GROUNDS = { White: "#ffffff", Black: "#000000", Grey: "#808080" };

/**
 * A reference: {name, url, data(), digest, report, problem, transparent, weight, change, isServers, element, thumb, ...}.
 * `isServers`: the picture is the server's, as the model reads it. `change`: what of it is repainted. `transparent`: the server
 * has to be told what stands behind it. `act` has what its buttons do.
 */
export function newItem(values, act) {
  const item = { report: null, problem: "", transparent: false, digest: undefined, weight: 1, change: null, isServers: false, ...values };
  item.image = h("img", { src: item.url, alt: "", draggable: false });
  item.number = h("span", { className: "number" });
  item.note = h("p", { className: "note small muted" });
  item.left = h("button", { type: "button", className: "quiet left", textContent: "←", onclick: () => act.move(-1) });
  item.right = h("button", { type: "button", className: "quiet right", textContent: "→", onclick: () => act.move(1) });
  item.drop = h("button", { type: "button", className: "quiet remove", textContent: "✕", onclick: () => act.remove() });
  item.thumb = h("div", { className: "thumb" }, item.image, item.number);
  item.slider = h("input", { type: "range", min: 0, max: MOST, step: 0.05, value: item.weight });
  item.counts = h("output", { className: "small muted" });
  item.weighing = h("div", { className: "weight", title: "How much it counts: 1 as it is, 0 not at all" }, item.slider, item.counts);
  const colour = h("input", { type: "color", value: "#ffffff", title: "Another colour" });
  colour.addEventListener("change", () => act.fill(colour.value));
  item.colour = colour;
  item.grounds = h("div", { className: "grounds tools", role: "group" }, h("span", { className: "small", textContent: "Behind it:" }),
    ...Object.entries(GROUNDS).map(([name, value]) => h("button", { type: "button", textContent: name, onclick: () => act.fill(value) })), colour);
  item.element = h("li", { draggable: true },
    item.thumb, h("div", { className: "tools" }, item.left, item.right, item.drop), item.weighing, item.note, item.grounds);
  // a slider is dragged by itself, not with its picture
  item.slider.addEventListener("pointerdown", () => { item.element.draggable = false; });
  for (const kind of ["pointerup", "pointercancel"]) item.slider.addEventListener(kind, () => { item.element.draggable = true; });
  item.slider.addEventListener("input", () => {
    item.weight = item.slider.valueAsNumber;
    showWeight(item);
    act.weigh();
  });
  return item;
}

function showWeight(item) {
  const text = item.weight.toFixed(2).replace(/0$/, "");
  item.counts.textContent = text;
  item.slider.setAttribute("aria-valuetext", item.weight === 0 ? "0, left out" : text);
}

/** Shows a reference as it is now; `number` is the one that prompts call it by. */
export function showItem(item, { number, isFirst, isLast, weighted }) {
  const name = item.problem ? item.name : `image ${number}`;
  item.number.textContent = item.problem ? "!" : `image ${number}`;
  item.element.classList.toggle("refused", Boolean(item.problem));
  item.image.alt = `${name}: ${item.name}`;
  item.left.disabled = isFirst;
  item.right.disabled = isLast;
  item.left.setAttribute("aria-label", `Move ${name} to the left`);
  item.right.setAttribute("aria-label", `Move ${name} to the right`);
  item.drop.setAttribute("aria-label", `Remove ${name}`);
  item.weighing.hidden = !weighted || Boolean(item.problem);
  item.slider.setAttribute("aria-label", `Weight of ${name}`);
  showWeight(item);
  item.grounds.hidden = !item.transparent;
  item.grounds.setAttribute("aria-label", `Background of ${name}`);
  item.colour.setAttribute("aria-label", `Another colour behind ${name}`);
  item.element.classList.toggle("asks", Boolean(item.transparent));
  item.note.textContent = item.problem || (item.report ? describe(item.report) : "");
  item.note.title = item.note.textContent;
}

/** What was done to a reference, in a few words. */
function describe(report) {
  const sides = ["left", "top", "right", "bottom"];
  const counted = (box) => (box ?? []).map((pixels, i) => (pixels ? `${pixels} ${sides[i]}` : "")).filter(Boolean);
  const cut = counted(report.cut), added = counted(report.added);
  const parts = [
    report.profile ? `colour profile ${report.profile}` : "",
    report.oriented ? "turned upright" : "",
    report.resized_to ? `scaled to ${size(report.resized_to)}` : "",
    cut.length ? `cut ${cut.join(", ")}` : "",
    added.length ? `padded ${added.join(", ")}` : "",
  ].filter(Boolean);
  if (!parts.length) return `${size(report.original_size)}, whole`;
  return `${size(report.original_size)}, ${parts.join(", ")}: used as ${size(report.processed_size)}`;
}
