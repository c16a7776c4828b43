// Runs the model, beside the page, which stays responsive. Messages: {load: ...} once, then {run: ...}.

import * as ort from "./ort.wasm.bundle.min.mjs";

let session;

// Fetches a file of a known number of bytes and says how much has come.
async function fetched(url, bytes, note) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be fetched: ${response.status} ${response.statusText}`);
  const found = new Uint8Array(bytes);
  const reader = response.body.getReader();
  for (let at = 0; ;) {
    const { done, value } = await reader.read();
    if (done && at === bytes) return found;
    if (done || at + value.length > bytes) throw new Error(`${url} has not ${bytes} bytes: copy the whole folder again`);
    found.set(value, at);
    at += value.length;
    note(value.length);
  }
}

async function load({ model, runtime }) {
  const total = model.bytes + runtime.bytes;
  let loaded = 0;
  const note = (bytes) => postMessage({ progress: (loaded += bytes) / total });
  const [graph, wasm] = await Promise.all([model, runtime].map(({ url, bytes }) => fetched(url, bytes, note)));
  ort.env.wasm.wasmBinary = wasm.buffer;
  ort.env.wasm.numThreads = 1; // more would need headers (COOP, COEP) that plain servers don't send
  session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
}

// An RGBA picture at a target of grid = [rows, columns] patches, cut out of cover = [height, width] pixels
// -> {name: {data, dims}} and the milliseconds.
async function run({ rgba, width, height, grid, cover }) {
  const images = new Uint8Array(3 * width * height);
  for (let i = 0, j = 0; i < images.length; j += 4) {
    images[i++] = rgba[j];
    images[i++] = rgba[j + 1];
    images[i++] = rgba[j + 2];
  }
  const shaped = ([h, w]) => new ort.Tensor("uint8", new Uint8Array(h * w), [h, w]); // only the shape is read
  const picture = new ort.Tensor("uint8", images, [1, height, width, 3]);
  const start = performance.now();
  const found = await session.run({ images: picture, grid: shaped(grid), cover: shaped(cover) });
  const ms = performance.now() - start;
  const outputs = {};
  for (const [name, { data, dims }] of Object.entries(found)) outputs[name] = { data, dims: [...dims] };
  return { outputs, ms };
}

onmessage = async ({ data }) => {
  try {
    postMessage({ result: await (data.load ? load(data.load) : run(data.run)) });
  } catch (error) {
    postMessage({ error: String(error?.message ?? error) });
  }
};
