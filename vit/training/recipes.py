"""What a fine-tuning run does: its numbers, the groups of its optimizer, and its learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from vit.checks import require_float, require_int, unknown
from vit.model import Block, ViT
from vit.trainable import decays, layer_of

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Recipe:
    """The numbers of a fine-tuning run, under timm's names. Defaults: the recipe "adamw".

    Rates are absolute: nothing is scaled by the batch size.

    Raises:
        ValueError: a field of the wrong type or out of range.
    """

    opt: str = "adamw"  # or "sgd"
    lr: float = 3e-4  # the highest learning rate, that of the head
    weight_decay: float = 0.05
    layer_decay: float = 0.75  # each block's rate is this share of the next one's (arXiv:1801.06146, arXiv:2106.08254)
    momentum: float = 0.9  # of SGD
    steps: int = 500  # updates of the weights
    warmup_steps: int = 50  # of them with a rising rate
    batch_size: int = 16  # images per step, over all processes
    grad_accum_steps: int = 1  # parts that a step's images are computed in, to save memory
    clip_grad: float = 1.0  # the largest norm of the gradient; 0: no limit
    smoothing: float = 0.1  # of labels (arXiv:1512.00567)
    mixup: float = 0.0  # the parameter alpha of mixup (arXiv:1710.09412); 0: none
    drop_path: float = 0.0  # stochastic depth of the last block (arXiv:1603.09382), rising linearly from 0
    model_ema_decay: float = 0.0  # of the average of the weights, which is then what is saved; 0: none
    scale: float = 0.35  # random crops cover at least this share of an image
    hflip: float = 0.5  # how often images are mirrored
    freeze: int = 0  # patches, positions and the first N blocks are not trained; -1: only the head is
    amp: str = ""  # "bfloat16" or "float16": the dtype of products, under autocast; "": that of the weights
    seed: int = 0

    def __post_init__(self) -> None:
        if self.opt not in OPTIMIZERS:
            raise ValueError(unknown("opt", self.opt, OPTIMIZERS))
        if self.amp not in ("", "bfloat16", "float16"):
            raise ValueError(unknown("amp", self.amp, ("bfloat16", "float16")))
        for name, least in _LEAST.items():
            require_int(name, getattr(self, name), least)
        require_float("lr", self.lr, above=0.0)
        for name, (low, high) in _RANGES.items():
            require_float(name, getattr(self, name))
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], not {getattr(self, name)}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be below steps, {self.steps}, not {self.warmup_steps}")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of grad_accum_steps {self.grad_accum_steps}"
            )


_LEAST = {"steps": 1, "warmup_steps": 0, "batch_size": 1, "grad_accum_steps": 1, "freeze": -1, "seed": 0}
_RANGES = {
    "weight_decay": (0, math.inf), "layer_decay": (1e-3, 1), "momentum": (0, 0.999), "clip_grad": (0, math.inf),
    "smoothing": (0, 0.999), "mixup": (0, math.inf), "drop_path": (0, 0.999), "model_ema_decay": (0, 0.999999),
    "scale": (1e-3, 1), "hflip": (0, 1),
}  # fmt: skip

# Recipes by name. What a recipe's source leaves to the data set, steps above all, is `finetune`'s to choose.
RECIPES = {
    "adamw": Recipe(),
    # AugReg's own fine-tuning (arXiv:2106.10270, section 3.3 and the configs of its code), at 384 px. The rate is the
    # largest of its grid, `AUGREG_RATES`; steps and warm-up are those for small data sets.
    "augreg": Recipe(
        opt="sgd", lr=0.03, weight_decay=0.0, layer_decay=1.0, steps=500, warmup_steps=100, batch_size=512,
        smoothing=0.0, scale=0.05,
    ),
    # MAE's fine-tuning (arXiv:2111.06377, table 9) without RandAugment and cutmix. Its rate is 5e-4 * batch / 256.
    "mae": Recipe(
        lr=2e-3, layer_decay=0.65, drop_path=0.1, mixup=0.8, batch_size=1024, steps=5000, warmup_steps=250, scale=0.08,
        clip_grad=0.0,
    ),
    # Only the head is trained, on features that stay as they are.
    "head": Recipe(lr=1e-3, weight_decay=0.0, layer_decay=1.0, freeze=-1, smoothing=0.0),
}  # fmt: skip
AUGREG_RATES = (0.001, 0.003, 0.01, 0.03)  # the grid of arXiv:2106.10270, over which accuracy varies by points


def learning_rate(step: int, steps: int, warmup_steps: int = 0) -> float:
    """The share of the highest rate at a step, counted from 0: a linear rise, then half a cosine down to 0.

    (SGDR, arXiv:1608.03983, without restarts.)
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups for any PyTorch optimizer.

    Each group has its own "lr", so that every scheduler that multiplies rates keeps their ratios. Weight decay is 0 for
    vectors (norms, biases, LayerScale), tokens and the position embedding. With `layer_decay` below 1 a block's rate is
    that share of the next block's (arXiv:1801.06146, in BEiT's form, arXiv:2106.08254): `lr` is the rate of the head,
    lr * layer_decay that of the last block and the norm after it, lr * layer_decay ** (depth + 1) that of patches,
    tokens and positions, as in timm.

    Returns:
        Groups with "params", "names", "lr" and "weight_decay".

    Raises:
        ValueError: a layer decay for a model that is no ViT; nothing to train.
    """
    if layer_decay != 1.0 and not isinstance(model, ViT):
        raise ValueError(f"layer_decay is for a vit.ViT: give {type(model).__name__} layer_decay=1.0")
    top = model.config.depth + 1 if isinstance(model, ViT) else 0
    own: set[str] = getattr(model, "no_weight_decay", set)()  # timm's models name theirs
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, top - 1) if isinstance(model, ViT) else 0
        decayed = decays(name, parameter) and name not in own
        group = groups.setdefault((layer, decayed), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
        group["lr"] = lr * layer_decay ** (top - layer)
        group["weight_decay"] = weight_decay if decayed else 0.0
    if not groups:
        raise ValueError("nothing is trained: no parameter of the model requires a gradient")
    return list(groups.values())


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Set what the recipe says of the model itself: drop path, and which parameters are trained.

    Raises:
        ValueError: drop path or `freeze` for a model that is no ViT, or more frozen blocks than there are.
    """
    if not isinstance(model, ViT):
        if recipe.drop_path or recipe.freeze:
            raise ValueError(f"drop_path and freeze are for a vit.ViT, not for {type(model).__name__}: set them to 0")
        return
    depth = model.config.depth
    if recipe.freeze > depth:
        raise ValueError(f"freeze={recipe.freeze} is more than the model's {depth} blocks; -1 trains only the head")
    for name, parameter in model.named_parameters():  # what the caller has frozen stays so
        below = not name.startswith("head") if recipe.freeze == -1 else layer_of(name, depth) <= recipe.freeze
        if recipe.freeze and below:
            parameter.requires_grad_(False)
    model.config = model.config.override(drop_path_rate=recipe.drop_path)
    for i, block in enumerate(cast(Iterable[Block], model.blocks)):
        rate = recipe.drop_path * i / max(depth - 1, 1)
        block.residual_attention.drop_path_rate = block.residual_mlp.drop_path_rate = rate


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; each group keeps its highest rate as "initial_lr", as PyTorch's schedulers do."""
    groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.layer_decay)
    for group in groups:
        group["initial_lr"] = group["lr"]
        del group["names"]
    if recipe.opt == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum)
    return torch.optim.AdamW(groups)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set each group's rate to a share of its highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
