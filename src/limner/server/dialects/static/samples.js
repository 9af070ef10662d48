// Sample pictures, and examples that load theirs and draw. All come with Limner.

import { byId, h } from "./dom.js";
import * as api from "./api.js";

const SAMPLES = ["cat", "beach", "dog", "meadow", "duck", "rocket"];
const EXAMPLES = [
  { prompt: "use the background of image 2", samples: ["cat", "beach"] },
  { prompt: "put the dog from image 2 into image 1 on the right", samples: ["meadow", "dog"] },
  { prompt: "put the sticker in the snow", samples: ["duck"] },
  { prompt: "the rocket over a gradient from purple to pink", samples: ["rocket"] },
];

const file = async (name) => new File([await api.blob(`/static/samples/${name}.png`)], `${name}.png`, { type: "image/png" });
const image = (name) => h("img", { src: `/static/samples/${name}.png`, alt: name, width: 128, height: 128, loading: "lazy" });

/** Offers them. `add(files)` takes samples, `example(prompt, files)` loads an example and draws it. */
export function offerSamples({ add, example }) {
  byId("samples").querySelector("ul").append(...SAMPLES.map((name) => h("li", {}, h("button", {
    type: "button", title: `Add ${name}`, "aria-label": `Add the sample ${name}`, onclick: async () => add([await file(name)]),
  }, image(name)))));
  byId("samples").hidden = false;
  byId("examples").append(...EXAMPLES.map(({ prompt, samples }) => h("li", {}, h("button", {
    type: "button", onclick: async () => example(prompt, await Promise.all(samples.map(file))),
  }, h("span", { className: "pair" }, ...samples.map(image)), h("span", { textContent: prompt })))));
}
