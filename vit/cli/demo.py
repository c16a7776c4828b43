"""`vit demo`: from images to labels and attention, with weights and images that ship with the package."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from vit.draw import BACKGROUND, GAP, caption, mosaic, overlay, scale, table
from vit.image import create_transform
from vit.maps import attention_maps
from vit.model import ViT
from vit.resources import digit_images

from . import options

MODEL = "vit_digits_patch4_32"
SIZES = ((32, 32), (48, 48), (32, 48))  # the model's own, a larger one, and one that is not square
BATCH_SIZE = 24  # small enough to stay in the processor's caches
DIGITS = 10


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="classify bundled images with a bundled model; needs no network",
        description="Classify 360 bundled handwritten digits at three image sizes with a bundled model, compare two "
        "attention functions, and draw where the class token looks. Needs no network.",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("vit-demo.png"), metavar="FILE", help="picture; default: %(default)s"
    )
    parser.set_defaults(run=run)


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    """Load, classify at three sizes, compare two attention functions, draw."""
    from vit.weights import load_pretrained

    options.check_picture(args.output)
    model = load_pretrained(MODEL)
    images, truth = digit_images()
    print(f"{MODEL}: {sum(p.numel() for p in model.parameters()):,} parameters, {model.provenance.layout} layout,")  # type: ignore[union-attr]
    print(f"{len(images)} handwritten digits of 8x8 pixels that it was not trained on\n")

    batches = {size: prepare(model, images, size) for size in SIZES}
    guesses = {}
    print("image size   patches   accuracy   ms/image")
    for (height, width), batch in batches.items():
        start = time.perf_counter()
        guesses[height, width] = torch.cat([model(part).argmax(dim=1) for part in batch.split(BATCH_SIZE)])
        elapsed = time.perf_counter() - start
        right = (guesses[height, width] == truth).sum().item()
        h, w = height // model.config.patch_size, width // model.config.patch_size
        print(
            f"{f'{height}x{width}':12} {f'{h}x{w}':9} {right / len(truth):7.2%}    {1000 * elapsed / len(truth):8.3f}"
            f"   ({right} of {len(truth)})"
        )

    shown = choose(truth)
    print(f"\ntruth         {' '.join(str(truth[i].item()) for i in shown)}")
    for (height, width), guess in guesses.items():
        print(f"at {f'{height}x{width}':10} {' '.join(str(guess[i].item()) for i in shown)}")

    print("\nattention     largest difference of a logit from `reference`, divided by the largest logit")
    for name, difference in compare_attention(model, batches[SIZES[0]][:64]).items():
        print(f"{name:13} {difference:.1e}")

    picture = draw(model, [images[i] for i in shown], {size: batch[shown] for size, batch in batches.items()})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(f"\nwhere the class token looks in the last block: {args.output.resolve()}")
    return 0


def prepare(model: ViT, images: list[Image.Image], size: tuple[int, int]) -> Tensor:
    """[B, 3, H, W]: the images squashed to `size`."""
    transform = create_transform(model, size, mode="squash")
    return torch.stack([transform(image) for image in images])


def choose(truth: Tensor) -> list[int]:
    """The first image of each digit."""
    return [int((truth == digit).nonzero()[0]) for digit in range(DIGITS)]


def compare_attention(model: ViT, batch: Tensor) -> dict[str, float]:
    """Each attention function's largest difference of a logit from `reference`, relative to the largest logit."""
    logits = {}
    for name in ("reference", "sdpa"):
        model.set_attention(name)
        logits[name] = model(batch)
    model.set_attention("sdpa")
    scale = logits["reference"].abs().max()
    return {name: ((values - logits["reference"]).abs().max() / scale).item() for name, values in logits.items()}


def draw(model: ViT, images: list[Image.Image], batches: dict[tuple[int, int], Tensor]) -> Image.Image:
    """One column per image; below it, per size, the class token's attention (mean of the heads) and the prediction."""
    enlarged = [image.convert("RGB").resize((80, 80), Image.Resampling.NEAREST) for image in images]
    rows: list[list[Image.Image | str]] = [[*enlarged]]
    titles = ["8x8 pixels"]
    for (height, width), batch in batches.items():
        (maps,) = attention_maps(model, batch)  # [B, A, 1, P + N]
        grid = height // model.config.patch_size, width // model.config.patch_size
        weights = maps.mean(dim=1)[:, 0, model.config.num_prefix_tokens :].unflatten(1, grid).numpy()  # [B, h, w]
        shape = (2 * width, 2 * height)
        rows += [[overlay(image, seen, shape) for image, seen in zip(images, weights)]]
        rows += [[str(guess) for guess in model(batch).argmax(dim=1).tolist()]]
        titles += [f"attention, {height}x{width}", "prediction"]
    sheet = table(rows, titles)
    key = "  Attention of the class token in the last block, averaged over the heads; each picture has its own scale:"
    bar = scale(sheet.width - 2 * GAP, ["0", "0.5", "1 = the picture's largest weight"])
    return mosaic([sheet, caption(key, sheet.width), ImageOps.expand(bar, GAP, BACKGROUND)], columns=1, gap=0)
