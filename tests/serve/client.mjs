// The official JavaScript client: node client.mjs MODULE POCKET_URL DEEPGEN_URL; prints what it saw as JSON.
import { pathToFileURL } from "node:url";

const [module, pocketURL, deepgenURL] = process.argv.slice(2);
const { default: OpenAI, toFile } = await import(pathToFileURL(module));
const open = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const pocket = open(pocketURL);
const deepgen = open(deepgenURL);
const seen = {};

seen.models = (await pocket.models.list()).data.map((one) => one.id);
const asked = { prompt: "a red circle", size: "64x64", seed: 3 };
const plain = await pocket.images.generate(asked);
seen.bytes = Buffer.from(plain.data[0].b64_json, "base64").subarray(1, 4).toString();
seen.total = plain.usage.total_tokens === plain.usage.input_tokens + plain.usage.output_tokens;

seen.events = [];
let last = null;
for await (const event of await pocket.images.generate({ ...asked, stream: true, partial_images: 2 })) {
  seen.events.push(event.type);
  last = event;
}
seen.same = last.b64_json.length > 1000;

const image = await toFile(Buffer.from(plain.data[0].b64_json, "base64"), "a.png", { type: "image/png" });
const edited = await deepgen.images.edit({ image: [image, image], prompt: "blue", size: "64x64", num_inference_steps: 2 });
seen.edited = edited.size;

seen.errors = [];
for (const wrong of [{ prompt: "" }, { model: "none" }, { style: "vivid" }, { n: 11 }]) {
  try {
    await pocket.images.generate({ ...asked, ...wrong });
  } catch (error) {
    seen.errors.push([error.constructor.name, error.status, error.param, error.code]);
  }
}
console.log(JSON.stringify(seen));
