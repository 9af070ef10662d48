// openai for Node, against the service at argv[2] with the pictures of argv[3] and argv[4]. Prints what came, as JSON.
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const [url, first, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const found = {};
const png = (path) => toFile(fs.readFileSync(path), path.split("/").pop(), { type: "image/png" });

let answer = await client.images.generate({
  model: "gpt-image-1", prompt: "a red ball", size: "64x80", output_format: "png", output_compression: 100,
  background: "auto", quality: "auto", n: 2,
});
found.generate = { pictures: answer.data.map((one) => one.b64_json), size: answer.size };
answer = await client.images.edit({ model: "dall-e-2", prompt: "make it blue", image: [await png(first), await png(first)] });
found.edit = { pictures: answer.data.map((one) => one.b64_json), references: answer.limner.references.length };
answer = await client.images.edit({
  prompt: "make it blue", image: [await png(first), await png(first)], mask: await png(mask), mask_blur: 0,
  reference_weights: [1, 0.5],
});
found.mask = { pictures: answer.data.map((one) => one.b64_json), canvas: answer.limner.canvas };
found.events = [];
const events = await client.images.generate({ prompt: "a red ball", size: "64x64", stream: true, partial_images: 1 });
for await (const event of events) found.events.push(event.type);
found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);
try {
  await client.images.generate({ prompt: "a red ball", size: "65x64" });
} catch (error) {
  found.error = { status: error.status, param: error.param };
}
console.log(JSON.stringify(found));
