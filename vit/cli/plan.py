"""What `vit finetune` is about to do: its recipe, its model and the data, decided and printed before it begins."""

import argparse
import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

from PIL import Image
from torch import nn

from vit.model import ViT
from vit.training import RECIPES, Recipe
from vit.training.recipes import AUGREG_RATES, prepare

from . import options
from .images import counted
from .splits import Splits

# What a recipe's source leaves to the data set; augreg has steps of its own.
EPOCHS = {"adamw": 10, "head": 10, "mae": 50}
AUGREG_SIZE = 384  # pixels
MAE_RATE = 5e-4  # for 256 images


def make_recipe(args: argparse.Namespace, images: int) -> Recipe:
    """The recipe that --recipe names, with the values that the other options state."""
    stated = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    stated = {name: value for name, value in stated.items() if value is not None}
    base = RECIPES[args.recipe]
    batch_size = stated.get("batch_size", base.batch_size)
    epochs = args.epochs
    if epochs is not None and "steps" in stated:
        raise ValueError("--epochs and --steps cannot go together: both say how long the run is")
    if epochs is None and "steps" not in stated:
        epochs = EPOCHS.get(args.recipe)
    if epochs is not None and not epochs > 0:
        raise ValueError(f"--epochs must be above 0, got {epochs}")
    if epochs is not None:
        stated["steps"] = max(1, round(epochs * (images // batch_size)))
    if "steps" in stated and "warmup_steps" not in stated:
        stated["warmup_steps"] = stated["steps"] // 10
    if args.recipe == "mae" and "lr" not in stated:
        stated["lr"] = MAE_RATE * batch_size / 256
    return replace(base, **stated)


def load(args: argparse.Namespace, classes: list[str]) -> tuple[ViT, str]:
    """The model with a head for these classes, named in the head's order, and what was done to the head, in words."""
    from vit.weights import load_pretrained

    size = args.img_size or (AUGREG_SIZE if args.recipe == "augreg" else None)
    settings = options.reading(args) | ({} if size is None else {"size": size})
    model = load_pretrained(args.model, grad_checkpointing=args.grad_checkpointing, **settings)
    same = model.categories is not None and sorted(model.categories) == classes
    if args.head == "keep" and not same:
        others = sorted({*classes} ^ {*(model.categories or [])})
        raise ValueError(
            f"--head keep: the classes of the data are not those of the checkpoint ({', '.join(others[:3])}"
            f"{' ...' * (len(others) > 3)} are in one of them only)"
        )
    if same and args.head != "new":
        return model, "kept, since the checkpoint has these classes"
    model.reset_classifier(len(classes))
    model.categories = classes
    for layer in (model.head, model.head_dist):
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
    return model, f"new, for {len(classes)} classes, and zero at first"


def describe(args: argparse.Namespace, recipe: Recipe, splits: Splits, model: ViT, head: str) -> None:
    """Print the plan."""
    from vit.weights.description import assumed

    prepare(model, recipe)
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    settings, guesses = model.preprocessing, assumed(model.config)
    height, width = settings.size
    per_class = Counter(name for _, name in splits.train)
    shown = ", ".join(f"{name} {per_class[name]}" for name in (model.categories or [])[:20])
    parts = [f"{counted(len(splits.train), 'image')} to train on", f"{len(splits.val)} to validate"]
    parts += [f"{len(splits.test)} to test"] * bool(splits.test)
    print(f"model    {args.model}; its head is {head}")
    how = f"{settings.mode} {settings.crop_pct}" if settings.mode == "crop" else settings.mode
    print(f"images   {height}x{width}, {how}, {settings.interpolation}, mean {settings.mean}, std {settings.std}")
    if guesses:
        named = ", ".join(f"{name} {entry['value']}" for name, entry in guesses.items())
        print(f"assumed  {named} (--set states them)")
    print(f"data     {args.data}: {', '.join(parts)} ({splits.how})")
    print(f"classes  {len(per_class)}; training images of each: {shown}{' ...' * (len(per_class) > 20)}")
    numbers = ", ".join(f"{name} {value}" for name, value in asdict(recipe).items() if value != "")
    print(f"recipe   {args.recipe}: {numbers}")
    if args.recipe == "augreg":
        print(f"         rates to try (--lr), since accuracy varies by points: {', '.join(map(str, AUGREG_RATES))}")
    if args.recipe == "mae":
        print(f"         its rate is {MAE_RATE} times the batch size / 256")
    epochs = recipe.steps / (len(splits.train) // recipe.batch_size)
    print(f"trained  {trained:,} of {count:,} parameters, {recipe.steps} steps, {epochs:.1f} epochs", flush=True)


def digest(splits: Splits, data: str) -> str:
    """A hash of the training and validation images and their classes: of a file its name in `data` and its size."""
    result = hashlib.sha256()
    root = Path(data) if Path(data).is_dir() else Path(data).parent
    for part in (splits.train, splits.val):
        for image, name in part:
            if isinstance(image, Image.Image):
                facts = [hashlib.sha256(image.tobytes()).hexdigest()]
            else:
                facts = [Path(os.path.relpath(image, root)).as_posix(), str(image.stat().st_size)]
            result.update(f"{json.dumps([*facts, name])}\n".encode())
        result.update(b"\n")
    return result.hexdigest()
