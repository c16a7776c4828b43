// What the page does: a picture goes to the worker, and what the model found is drawn.
// In the browser's console, `answer` holds the last outputs: {name: {data, dims}}.

const $ = (id) => document.getElementById(id);
const LARGEST = 2048; // pixels of the longer side; the browser makes larger pictures smaller
const NAMES = 12; // of classes, in the first lines
const NEAREST = 5; // patches that are outlined
const MAGMA = [ // the colours of vit/draw.py: "magma", N. Smith and S. van der Walt, CC0
  [0, 0, 4], [11, 9, 36], [32, 17, 75], [59, 15, 112], [87, 21, 126], [114, 31, 129], [140, 41, 129], [168, 50, 125],
  [196, 60, 117], [222, 73, 104], [241, 96, 93], [250, 127, 94], [254, 159, 109], [254, 191, 132], [253, 222, 160],
  [252, 253, 191],
];

let facts; // model.json
let picture; // {rgba, width, height, note, number}
let found; // the answer to it: {outputs, ms, rows, columns, key}
let chosen = [0.5, 0.5]; // of the rows and columns: where the patch is whose like are searched
let stream; // the camera's

// ---- loading

class Plain extends Error {} // its message is for the reader as it is

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// The worker is made of a blob, so that this page's policy holds for it: one made of a file would have none.
const here = (name) => new URL(name, location.href).href;
let worker, waiting;

function ask(message) {
  return new Promise((resolve, reject) => {
    waiting = { resolve, reject };
    worker.postMessage(message);
  });
}

function startWorker() {
  const code = new Blob([`import ${JSON.stringify(here("worker.js"))};`], { type: "text/javascript" });
  const url = URL.createObjectURL(code);
  worker = new Worker(url, { type: "module" });
  worker.onmessage = ({ data }) => {
    if ("progress" in data) $("progress").value = data.progress;
    else if ("error" in data) waiting.reject(new Error(data.error));
    else waiting.resolve(data.result);
  };
  const missing = "worker.js or ONNX Runtime Web cannot be loaded: copy the whole folder again";
  worker.onerror = () => waiting.reject(new Error(missing));
}

async function load() {
  if (typeof WebAssembly !== "object") {
    const reason = "This browser has no WebAssembly, in which the model runs, or it is turned off";
    throw new Plain(`${reason}: use another browser.`);
  }
  const response = await fetch("model.json");
  if (!response.ok) throw new Error(`model.json cannot be fetched: ${response.status} ${response.statusText}`);
  facts = await response.json();
  say(`Loading ${(facts.bytes + facts.runtime.bytes) / 1e6 | 0} MB: the model and ONNX Runtime Web.`);
  startWorker();
  await ask({
    load: {
      model: { url: here(facts.file), bytes: facts.bytes },
      runtime: { url: here(facts.runtime.file), bytes: facts.runtime.bytes },
    },
  });
  const [height, width] = facts.covers[facts.own];
  const rgba = new Uint8Array(4 * width * height);
  await ask({ run: { rgba, width, height, ...step(facts.own) } }); // the first run is slow
}

// ---- pictures

async function decode(file) {
  let image;
  try {
    // as Pillow reads it: upright, and the numbers as they are in the file, without its colour profile
    image = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Plain(`This browser cannot read ${file.name ?? "the picture"}: try a PNG or JPEG file.`);
  }
  return grab(image, image.width, image.height);
}

// The pixels of a bitmap or of the camera's frame.
function grab(image, width, height) {
  const scale = Math.min(1, LARGEST / Math.max(width, height));
  const [w, h] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(w, h);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "white"; // behind what is transparent
  pen.fillRect(0, 0, w, h);
  pen.drawImage(image, 0, 0, w, h);
  const note = scale < 1 ? `, made smaller by the browser from ${height} x ${width}` : "";
  return { rgba: pen.getImageData(0, 0, w, h).data, width: w, height: h, note };
}

let shown = 0;

async function show(next) {
  picture = { ...next, number: shown++ };
  found = undefined;
  $("rows").replaceChildren();
  const canvas = $("source");
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.classList.toggle("few", picture.width < 64);
  canvas.getContext("2d").putImageData(new ImageData(picture.rgba, picture.width, picture.height), 0, 0);
  $("picture-shape").textContent = `picture ${picture.height} x ${picture.width} x 3${picture.note}`;
  await answerIt();
}

async function open(file) {
  stopCamera();
  await attempt(async () => show(await decode(file)));
}

async function openExample() {
  stopCamera();
  await attempt(async () => show(await decode(await (await fetch(facts.example.file)).blob())));
}

// ---- the camera

async function startCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Plain("The camera needs a page from https or from localhost: this one comes from elsewhere.");
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    const denied = error.name === "NotAllowedError";
    throw new Plain(denied ? "The browser was not allowed to use the camera." : "No camera was found that is free.");
  }
  const video = $("video");
  video.srcObject = stream;
  await video.play();
  $("camera").textContent = "stop the camera";
  $("camera").setAttribute("aria-pressed", "true");
  $("labels").setAttribute("aria-live", "off"); // the answers come too fast to be read aloud
  while (stream) {
    await show(grab(video, video.videoWidth, video.videoHeight));
    await new Promise(requestAnimationFrame);
  }
}

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = undefined;
  $("camera").textContent = "use the camera";
  $("camera").setAttribute("aria-pressed", "false");
  $("labels").setAttribute("aria-live", "polite");
}

// ---- a canvas to draw on, for the model of scikit-learn's digits

function preparePad() {
  const pad = $("pad");
  const pen = pad.getContext("2d", { willReadFrequently: true });
  const at = { x: pad.width / 2, y: pad.height / 4, down: false };
  let timer;
  const clear = () => {
    pen.fillStyle = "black";
    pen.fillRect(0, 0, pad.width, pad.height);
    Object.assign(pen, { strokeStyle: "white", lineWidth: pad.width / 6, lineCap: "round", lineJoin: "round" });
  };
  const line = (x, y) => {
    pen.beginPath();
    pen.moveTo(at.x, at.y);
    pen.lineTo(x, y);
    pen.stroke();
    clearTimeout(timer);
    timer = setTimeout(() => attempt(() => show(asTheDigits(pad))), 150);
  };
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [x * pad.width, y * pad.height];
  };
  pad.onpointerdown = (event) => {
    stopCamera();
    pad.setPointerCapture(event.pointerId);
    [at.x, at.y] = place(event);
    at.down = true;
    line(at.x, at.y);
  };
  pad.onpointermove = (event) => {
    if (!at.down || !pad.hasPointerCapture(event.pointerId)) return;
    const [x, y] = place(event);
    line(x, y);
    Object.assign(at, { x, y });
  };
  pad.onpointerup = pad.onpointercancel = () => (at.down = false);
  pad.onkeydown = (event) => {
    const step = { " ": [0, 0], ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    stopCamera();
    if (event.key === " ") at.down = !at.down;
    const [x, y] = [at.x + step[0] * 16, at.y + step[1] * 16].map((to) => Math.min(Math.max(to, 0), pad.width));
    if (at.down) line(x, y);
    Object.assign(at, { x, y });
    const place = `${Math.round(x / 16)} from the left, ${Math.round(y / 16)} from the top`;
    pad.setAttribute("aria-label", `Pen ${at.down ? "down" : "up"}, ${place}`);
  };
  $("clear").onclick = clear;
  clear();
  $("drawing").hidden = false;
}

// A drawing as the training pictures were made: cut out, 8 pixels high, each the share of ink in it.
function asTheDigits(pad) {
  const { data, width, height } = pad.getContext("2d").getImageData(0, 0, pad.width, pad.height);
  let [left, top, right, bottom] = [width, height, 0, 0];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (data[4 * (y * width + x)] < 128) continue;
      [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
    }
  }
  const side = Math.max(right - left, bottom - top, width / 8);
  const pen = new OffscreenCanvas(64, 64).getContext("2d");
  pen.fillStyle = "black";
  pen.fillRect(0, 0, 64, 64);
  pen.drawImage(pad, (left + right - side) / 2, (top + bottom - side) / 2, side, side, 0, 0, 64, 64);
  const large = pen.getImageData(0, 0, 64, 64).data;
  const rgba = new Uint8ClampedArray(4 * 64).fill(255);
  for (let i = 0; i < 64; i++) {
    let ink = 0; // in the 8 x 8 pixels that become one
    for (let j = 0; j < 64; j++) ink += large[4 * ((8 * (i >> 3) + (j >> 3)) * 64 + 8 * (i & 7) + (j & 7))];
    rgba.fill(ink / 64, 4 * i, 4 * i + 3);
  }
  return { rgba, width: 8, height: 8, note: ": the drawing, cut out and made as small as the training pictures" };
}

// ---- answers

let busy = false;

// Ask for the current picture at the current size; what changes meanwhile is asked for afterwards.
async function answerIt() {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  try {
    while (picture && found?.key !== key()) {
      const [asked, [rows, columns]] = [key(), grid()];
      const { rgba, width, height } = picture;
      const answer = await ask({ run: { rgba, width, height, ...step($("size").value) } });
      found = { ...answer, rows, columns, key: asked };
      globalThis.answer = found.outputs;
      if (asked === key()) draw();
    }
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}

const key = () => `${picture.number} ${$("size").value}`;
const grid = () => facts.grids[$("size").value];
const step = (i) => ({ grid: facts.grids[i], cover: facts.covers[i] });

function draw() {
  const { outputs, ms, rows, columns } = found;
  const p = facts.patch;
  const tokens = facts.prefix + rows * columns;
  $("view").setAttribute("aria-label", `What the model sees, in ${rows} rows and ${columns} columns of patches`);
  paint($("view"), (pen, w, h) => lines(pen, w, h));
  $("patches-shape").textContent =
    `pixels 1 x ${facts.channels} x ${rows * p} x ${columns * p} → ${rows} x ${columns} = ${rows * columns} patches of ` +
    `${p} x ${p} → tokens 1 x ${tokens} x ${facts.width} (${facts.prefix} more than patches: the class token` +
    `${facts.prefix > 1 ? " and others" : ""})`;
  drawHeads(outputs.attention);
  if (facts.classes) drawLabels(outputs.logits);
  else drawNear(outputs.patches);
  addRow(tokens, ms);
}

// The pixels that the model sees, and on them what `over` draws; colours in place of grey where there is heat.
function paint(canvas, over, heat) {
  const { rows, columns } = found;
  const { data, dims: [, height, width, channels] } = found.outputs.pixels;
  const image = new ImageData(width, height);
  const most = heat ? heat.reduce((a, b) => Math.max(a, b), 1e-12) : 0;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const [r, g, b] = [0, 1, 2].map((c) => data[i * channels + (channels === 3 ? c : 0)]);
      let colour = [r, g, b];
      if (heat) {
        const grey = 0.299 * r + 0.587 * g + 0.114 * b;
        const place = Math.floor((y * rows) / height) * columns + Math.floor((x * columns) / width);
        colour = magma(heat[place] / most).map((one) => 0.3 * grey + 0.7 * one);
      }
      image.data.set([...colour, 255], 4 * i);
    }
  }
  const small = new OffscreenCanvas(width, height);
  small.getContext("2d").putImageData(image, 0, 0);
  const side = heat ? 320 : 640;
  const scale = side / Math.max(width, height);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = scale < 1;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  over?.(pen, canvas.width, canvas.height);
}

function magma(strength) {
  const place = Math.min(Math.max(strength, 0), 1) * (MAGMA.length - 1);
  const i = Math.min(Math.floor(place), MAGMA.length - 2);
  return MAGMA[i].map((one, c) => one + (place - i) * (MAGMA[i + 1][c] - one));
}

function lines(pen, width, height) {
  const { rows, columns } = found;
  pen.fillStyle = "rgb(255 255 255 / 0.55)";
  const thick = Math.max(1, Math.min(3, width / columns / 12));
  for (let c = 1; c < columns; c++) pen.fillRect((c * width) / columns - thick / 2, 0, thick, height);
  for (let r = 1; r < rows; r++) pen.fillRect(0, (r * height) / rows - thick / 2, width, thick);
}

function drawHeads({ data, dims: [, heads, rows, columns] }) {
  const N = rows * columns;
  const parts = Array.from({ length: heads }, (_, head) => data.subarray(head * N, (head + 1) * N));
  const mean = parts[0].map((_, i) => parts.reduce((sum, part) => sum + part[i], 0) / heads);
  const box = $("heads");
  while (box.children.length <= heads) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    figure.append(canvas, document.createElement("figcaption"));
    box.append(figure);
  }
  [...parts, mean].forEach((weights, head) => {
    const [canvas, caption] = box.children[head].children;
    const name = head < heads ? `head ${head}` : "the mean of the heads";
    const best = weights.indexOf(weights.reduce((a, b) => Math.max(a, b)));
    const where = `row ${Math.floor(best / columns) + 1}, column ${(best % columns) + 1}`;
    caption.textContent = `${name}, at most ${percent(weights[best])}`;
    canvas.setAttribute("aria-label", `Attention of ${name}: most, ${percent(weights[best])}, at ${where}`);
    paint(canvas, null, weights);
  });
  $("attention-shape").textContent =
    `attention 1 x ${heads} x ${rows} x ${columns}: heads x rows x columns; ` +
    "each picture from black, 0, to its own largest weight";
}

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}\u00a0%`;

function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const powers = Array.from(logits, (x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((x) => x / sum);
}

const named = (i) => facts.categories?.[i] ?? `class ${i}`;

function best(logits) {
  if (logits.length === 1) return [[0, null, logits[0].toFixed(3)]];
  const shares = softmax(logits);
  return shares.map((share, i) => [i, share, percent(share)]).sort((a, b) => b[1] - a[1]).slice(0, 5);
}

function drawLabels({ data }) {
  $("labels").replaceChildren(...best(data).map(([i, share, text]) => {
    const item = document.createElement("li");
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${100 * (share ?? 0)}%`;
    const label = document.createElement("span");
    label.textContent = named(i);
    const value = document.createElement("span");
    value.textContent = text;
    item.append(bar, label, value);
    return item;
  }));
  const shares = data.length > 1 ? " → softmax, which sums to 1" : "";
  $("answer-shape").textContent = `features 1 x ${facts.features} → logits 1 x ${data.length}${shares}`;
}

// A model without a classifier: how alike the patches are to one of them, by the cosine of their features [N, D].
function drawNear({ data, dims: [, N, D] }) {
  const { rows, columns } = found;
  const at = Math.floor(chosen[0] * rows) * columns + Math.floor(chosen[1] * columns);
  const patch = (i) => data.subarray(i * D, (i + 1) * D);
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const one = patch(at);
  const alike = Float32Array.from({ length: N }, (_, i) => {
    const other = patch(i);
    return dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
  });
  const order = [...alike.keys()].filter((i) => i !== at).sort((a, b) => alike[b] - alike[a]).slice(0, NEAREST);
  const mark = (pen, i, colour, width, height) => {
    const [w, h] = [width / columns, height / rows];
    Object.assign(pen, { strokeStyle: colour, lineWidth: 3 });
    pen.strokeRect((i % columns) * w + 1, Math.floor(i / columns) * h + 1, w - 2, h - 2);
  };
  paint($("near"), (pen, w, h) => {
    order.forEach((i) => mark(pen, i, "#4ade80", w, h));
    mark(pen, at, "#ffffff", w, h);
  }, alike.map((x) => Math.max(x, 0)));
  const place = (i) => `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`;
  $("near").setAttribute("aria-label", `Patches like the one in ${place(at)}; arrows choose another`);
  $("labels").replaceChildren(...order.map((i) => {
    const item = document.createElement("li");
    const [label, value] = [document.createElement("span"), document.createElement("span")];
    label.textContent = place(i);
    value.textContent = `cosine ${alike[i].toFixed(3)}`;
    item.append(label, value);
    return item;
  }));
  $("answer-shape").textContent = `patch features 1 x ${N} x ${D}; the white patch is in ${place(at)}`;
}

function prepareNear() {
  $("answer-name").textContent = "Patches that are alike";
  $("answer-text").textContent =
    "This model has no classifier, so there are no labels. Click on a patch, or choose it with the arrows: " +
    "the patches whose features are most like its own are outlined in green.";
  $("sizes-answer").hidden = true;
  const near = $("near");
  near.hidden = false;
  const choose = (...place) => {
    chosen = place.map((share) => Math.min(Math.max(share, 0), 0.9999));
    if (found) drawNear(found.outputs.patches);
  };
  near.onclick = (event) => {
    const box = near.getBoundingClientRect();
    choose((event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
  };
  near.onkeydown = (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !found) return;
    event.preventDefault();
    const sides = [found.rows, found.columns];
    choose(...sides.map((side, i) => (Math.floor(chosen[i] * side) + step[i] + 0.5) / side));
  };
}

// One row for each size that the current picture was seen at.
function addRow(tokens, ms) {
  const row = document.createElement("tr");
  row.dataset.size = $("size").value;
  const [rows, columns] = grid();
  const cells = [`${rows * facts.patch} x ${columns * facts.patch}`, tokens, ms.toFixed(ms < 10 ? 1 : 0)];
  if (facts.classes) {
    const [[i, , text]] = best(found.outputs.logits.data);
    cells.push(`${named(i)}, ${text}`);
  }
  row.append(...cells.map((cell) => Object.assign(document.createElement("td"), { textContent: cell })));
  const others = [...$("rows").children].filter((other) => other.dataset.size !== row.dataset.size);
  others.forEach((other) => other.classList.remove("now"));
  row.classList.add("now");
  $("rows").replaceChildren(...[...others, row].sort((a, b) => a.dataset.size - b.dataset.size));
}

function sized() {
  const [rows, columns] = grid();
  const own = Number($("size").value) === facts.own ? ", as exported" : "";
  const text = `${rows * facts.patch} x ${columns * facts.patch} pixels${own}`;
  $("size-text").textContent = text;
  $("size").setAttribute("aria-valuetext", text);
}

async function tryAll() {
  stopCamera();
  const [now, same] = [$("size").value, picture];
  for (const i of [...facts.grids.keys(), now]) {
    if (picture !== same && i !== now) continue;
    $("size").value = i;
    sized();
    await answerIt();
  }
}

// How close this browser comes to PyTorch, on the example at the model's own size.
function prove() {
  const { output, values } = facts.example;
  const centre = (x) => { // logits without their mean, which changes no answer and would hide what does
    const mean = output === "logits" && x.length > 1 ? x.reduce((a, b) => a + b) / x.length : 0;
    return Array.from(x, (one) => one - mean);
  };
  const [ours, theirs] = [centre(found.outputs[output].data), centre(values)];
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const cosine = dot(ours, theirs) / Math.sqrt(dot(ours, ours) * dot(theirs, theirs));
  $("proof").textContent =
    `On the example, this browser's ${output} and those of the model in PyTorch have a cosine of ` +
    `${cosine.toFixed(5)} (1 is the same).`;
}

// ---- start

// Runs something that may fail for a reason that the reader should know.
async function attempt(task) {
  try {
    say("");
    await task();
  } catch (error) {
    stopCamera();
    say(error instanceof Plain ? error.message : `That did not work: ${error.message}`, true);
  }
}

function prepare() {
  const names = facts.categories ?? [];
  const count = names.length === 1 ? "one class" : `${names.length} classes`;
  const more = names.length > NAMES ? " and others" : "";
  const knows = names.length ? `It knows ${count}: ${names.slice(0, NAMES).join(", ")}${more}. ` : "";
  $("model").textContent =
    `${knows}${facts.name}: ${facts.depth} block${facts.depth > 1 ? "s" : ""} with ${facts.heads} heads, patches of ${facts.patch} x ${facts.patch} pixels, ` +
    `${(facts.bytes / 1e6).toFixed(1)} MB in ${facts.precision}. It runs in this browser: no picture leaves it.`;
  $("size").max = facts.grids.length - 1;
  $("size").value = facts.own;
  sized();
  if (facts.classes) $("answer-text").textContent = facts.reads;
  else prepareNear();
  if (facts.draw) preparePad();
  $("size").oninput = () => { sized(); attempt(answerIt); };
  $("file").onchange = ({ target }) => { if (target.files[0]) open(target.files[0]); target.value = ""; };
  $("example").onclick = openExample;
  $("camera").onclick = () => (stream ? stopCamera() : attempt(startCamera));
  $("all").onclick = () => attempt(tryAll);
  addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  addEventListener("dragleave", () => $("drop").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) open(file);
    else say("What was dropped is no file: save the picture and drop the file.", true);
  });
  addEventListener("paste", (event) => { if (event.clipboardData.files[0]) open(event.clipboardData.files[0]); });
  $("main").hidden = false;
}

try {
  await load();
  prepare();
  $("progress").hidden = true;
  await openExample();
  if (found) prove();
  document.documentElement.dataset.state = "ready";
} catch (error) {
  $("progress").hidden = true;
  say(error instanceof Plain ? error.message : `The page cannot start: ${error.message}`, true);
  document.documentElement.dataset.state = "failed";
}
