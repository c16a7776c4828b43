"""timm's ViT-like models by name: what becomes of the folder that timm writes for each, when it is loaded here."""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from helpers import FLOAT32, difference, images, randomize
from torch import nn

import vit

MODULES = (
    "vision_transformer", "deit", "eva", "beit", "naflexvit", "vision_transformer_hybrid", "vision_transformer_relpos",
    "vision_transformer_sam",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one way of loading gave."""

    result: str  # "equal", "WRONG", "refused"
    why: str  # the difference of the logits relative to timm's, or the error


def names() -> list[str]:
    """timm's models that are built like a ViT or named like one, by module."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


def folder_of(name: str, folder: Path) -> nn.Module:
    """timm's model of that name with one or two blocks and random weights, written as timm writes it."""
    one = {"depth": 1} | ({"num_kv_heads": 4} if "sapiens" in name else {})  # for each block, or there are too many
    with torch.device("meta"):
        width = timm.create_model(name, **one).num_features
    small = one | {"depth": 2 if width <= 1100 else 1}  # two of the widest fill the memory and show no more
    twin = randomize(timm.create_model(name, num_classes=7, **small)).eval()
    timm.models.save_for_hf(twin, folder, safe_serialization=True)
    return twin


@torch.no_grad()
def load(twin: nn.Module, path: Path, **stated: object) -> Outcome:
    """Load a folder or a file with what the caller states, and compare the logits with timm's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = vit.load_pretrained(path, **stated)
    except ValueError as error:
        return Outcome("refused", str(error).replace(f"{path}/", ""))
    x = images(1, *twin.pretrained_cfg["input_size"])
    gap = difference(ours(x), twin(x))
    return Outcome("equal" if gap <= FLOAT32 else "WRONG", f"{gap:.0e}")


def stated_by_the_caller(twin: nn.Module) -> dict[str, object]:
    """What weights do not show, with the values that are true of this model."""
    block = twin.blocks[0]
    attention, norm = getattr(block, "attn", None), getattr(block, "norm1", None)
    facts = {"num_heads": getattr(attention, "num_heads", None), "eps": getattr(norm, "eps", None), "gelu": "erf"}
    size = tuple(twin.pretrained_cfg["input_size"][1:])
    return {field: value for field, value in facts.items() if value is not None} | {"img_size": size}


def outcomes(name: str) -> dict[str, Outcome]:
    """Load a model with its config.json and without, with the caller's help and without."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        twin = folder_of(name, folder)
        stated = stated_by_the_caller(twin)
        results = {"folder": load(twin, folder), "folder, all stated": load(twin, folder, **stated)}
        (folder / "config.json").unlink()
        return results | {"weights alone": load(twin, folder), "weights, all stated": load(twin, folder, **stated)}
