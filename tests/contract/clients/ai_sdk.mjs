// The AI SDK with three of its providers, against the service at argv[2] with the picture of argv[3], and masks of both kinds.
import fs from "node:fs";
import { createBlackForestLabs } from "@ai-sdk/black-forest-labs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";

const [url, first, mask, white] = process.argv.slice(2);
const images = [fs.readFileSync(first)];
const hosted = createBlackForestLabs({ baseURL: `${url}/v1`, apiKey: "none", pollIntervalMillis: 20 });
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const other = createOpenAICompatible({ name: "limner", baseURL: `${url}/v1`, apiKey: "none" });
const klein = hosted.image("flux-2-klein-9b");
const found = {};

async function draw(name, options) {
  const { images } = await generateImage({ maxRetries: 0, ...options });
  found[name] = images.map((one) => one.base64);
}

await draw("size", { model: klein, prompt: "a rocket", size: "64x80", seed: 1 });
await draw("aspect", { model: klein, prompt: "a rocket", aspectRatio: "16:9" });
await draw("options", {
  model: klein, prompt: "a rocket", size: "64x64",
  providerOptions: {
    blackForestLabs: {
      steps: 2, guidance: 3, raw: true, promptUpsampling: true, outputFormat: "png", safetyTolerance: 6,
      imagePromptStrength: 0.2,
    },
  },
});
await draw("edit", { model: klein, prompt: { text: "make it blue", images: [...images, ...images] } });
await draw("mask", {
  model: klein, prompt: { text: "make it blue", images, mask: fs.readFileSync(white) },
  providerOptions: { blackForestLabs: { outputFormat: "png" } },
});
await draw("openai", { model: openai.image("gpt-image-1"), prompt: "a rocket", size: "64x64", n: 2 });
await draw("openai edit", {
  model: openai.image("gpt-image-1"), prompt: { text: "make it blue", images, mask: fs.readFileSync(mask) },
});
await draw("compatible", {
  model: other.imageModel("flux-2-klein-9b"), prompt: { text: "make it blue", images },
  providerOptions: { limner: { seed: 3, num_inference_steps: 2 } },
});
console.log(JSON.stringify(found));
