"""`vit finetune --check`: one augmented batch, drawn and overfitted, before a night is spent."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from vit.image import Transform
from vit.model import ViT
from vit.training import Images, RandomCrop, Recipe
from vit.training.data import batches, loader
from vit.training.distributed import precision
from vit.training.loop import backward, clip
from vit.training.recipes import make_optimizer, prepare, set_rates
from vit.training.setup import default_transforms

STEPS = 50


def overfit(model: ViT, data: list[Any], recipe: Recipe, folder: Path, device: torch.device) -> int:
    """Draw the first batch to `folder`/check.png, and train a copy of the model on it alone.

    Returns:
        The exit code: 0 if the copy gets nine in ten of them right at a lower loss, otherwise 1.
    """
    augment, _ = default_transforms(model, recipe, None, None)
    assert isinstance(augment, RandomCrop)
    (keys,) = batches(len(data), recipe.batch_size, 0, 1, recipe.seed)
    (batch,) = loader(Images(data, augment, recipe.seed, model.config.in_chans), [keys], 0, device)
    folder.mkdir(parents=True, exist_ok=True)
    names = [(model.categories or [])[label] for label in batch.label.tolist()]
    contact_sheet(batch.image, names, augment.transform).save(folder / "check.png")
    print(f"{folder / 'check.png'}: the first {len(names)} images as the model sees them in training")

    # the recipe, without what keeps a loss from falling
    recipe = replace(recipe, smoothing=0.0, mixup=0.0, drop_path=0.0)
    model = copy.deepcopy(model)
    prepare(model, recipe)
    model.to(device).train()
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16")
    context = precision(recipe.amp, device, "none")
    losses = []
    for step in range(STEPS):
        set_rates(optimizer, min(1.0, (step + 1) / 10))
        optimizer.zero_grad()
        losses.append(backward(model, batch, recipe, 0, None, scaler, context))
        clip(model, optimizer, scaler, recipe.clip_grad)
        scaler.step(optimizer)
        scaler.update()
    with torch.no_grad(), context():
        right = int((model.eval()(batch.image.to(device)).argmax(dim=1).cpu() == batch.label).sum())
    learned = right >= 0.9 * len(batch.label) and losses[-1] < 0.9 * losses[0]
    print(
        f"trained on these alone for {STEPS} steps: the loss goes from {losses[0]:.3f} to {losses[-1]:.3f},"
        f" and {right} of {len(batch.label)} are right"
        + ("" if learned else ": nearly all should be, at a much lower loss: try another --lr")
    )
    return 0 if learned else 1


def contact_sheet(images: torch.Tensor, names: list[str], transform: Transform) -> Image.Image:
    """[B, C, H, W] normalised images in rows, each with its class below it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()  # [B, H, W, C]
    tiles = [Image.fromarray(one if one.shape[2] == 3 else one[:, :, 0]).convert("RGB") for one in pixels]
    scale = max(1, 96 // min(tiles[0].size))
    width, height = (side * scale for side in tiles[0].size)
    columns = min(8, len(tiles))
    sheet = Image.new("RGB", (columns * (width + 4), math.ceil(len(tiles) / columns) * (height + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, name) in enumerate(zip(tiles, names)):
        left, top = i % columns * (width + 4), i // columns * (height + 18)
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left + 2, top + height + 2), name, fill="black")
    return sheet
