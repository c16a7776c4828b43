"""transformers.js itself, in node, beside PyTorch: the folder of `vit export --format transformersjs`.

    pip install -e '.[onnx]'; npm install --ignore-scripts --prefix DIR @huggingface/transformers
    python tests/reports/transformersjs.py --node-modules DIR/node_modules

Prints the largest difference of the logits over the largest one, for pixels that are handed over as a tensor, for a
picture of the model's own size, and for a photograph that transformers.js resizes itself, which it does without
Pillow's antialiasing. Exit code 1 if one of the first two is beyond the bar of the export.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import vit
from vit.exporting.gate import BARS
from vit.resources import DATA

SCRIPT = """
import fs from "node:fs";
import {AutoModelForImageClassification, AutoImageProcessor, RawImage, Tensor, env} from "@huggingface/transformers";
const [folder, name] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const {pixels, shape} = JSON.parse(fs.readFileSync(`${folder}/pixels.json`));
const model = await AutoModelForImageClassification.from_pretrained(name);
const prepare = await AutoImageProcessor.from_pretrained(name);
const found = {};
const run = async (inputs) => Array.from((await model(inputs)).logits.data);
found.tensor = await run({pixel_values: new Tensor("float32", Float32Array.from(pixels), shape)});
for (const file of ["own", "photograph"])
    found[file] = await run(await prepare(await RawImage.read(`${folder}/${file}.png`)));
console.log(JSON.stringify(found));
"""


@torch.inference_mode()
def main() -> int:
    """Export, run in node, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_digits_patch4_32", help="a checkpoint with a classifier")
    parser.add_argument("--node-modules", type=Path, required=True)
    args = parser.parse_args()
    model = vit.load_pretrained(args.model)
    transform = vit.create_transform(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vit.export(model, folder / "model", "transformersjs")
        with Image.open(DATA / "photographs" / "coffee.jpg") as picture:
            photograph = picture.convert("RGB")
        own = transform.view(photograph)
        photograph.save(folder / "photograph.png")
        own.save(folder / "own.png")
        x = transform(photograph)[None]
        (folder / "pixels.json").write_text(json.dumps({"pixels": x.flatten().tolist(), "shape": list(x.shape)}))
        (folder / "run.mjs").write_text(SCRIPT)
        (folder / "node_modules").symlink_to(args.node_modules.resolve())
        command = ["node", str(folder / "run.mjs"), name, "model"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    wanted, worst = model(x)[0], 0.0
    for kind, values in found.items():
        error = ((torch.tensor(values) - wanted).abs().max() / wanted.abs().max()).item()
        print(f"{error:.1e}  {kind}")
        worst = max(worst, error) if kind != "photograph" else worst
    return int(worst > BARS["float32"])


if __name__ == "__main__":
    sys.exit(main())
