"""Features that `vit features` wrote, read back with the classes of their images."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.config import ViTConfig

from .datasets import Sample
from .shards import index_of, read_metadata

# What must be the same for features to be compared; that they were saved in another dtype does not matter.
SAME = ("kind", "model_sha256", "model_config", "transform", "computed", "optimize", "prefix")


@dataclass(frozen=True)
class Stored:
    """Rows of features [n, D] float32, their images with classes, why others were skipped, and all settings."""

    file: Path
    rows: Tensor
    samples: list[Sample]
    skipped: list[str]
    settings: dict[str, str]

    @property
    def name(self) -> str:
        """What the rows are, in the words of `vit.probe.columns` where it has them."""
        config = ViTConfig(**json.loads(self.settings["model_config"]))
        pool = {"class": "token", "dense": "avg"}.get(self.settings["kind"], config.global_pool)
        name = {"token": "class", "avg": "patch mean", "token_avg": "class + patch mean"}.get(pool, "pooled")
        return f"{name}, no norm" if config.fc_norm and self.settings["kind"] != "pooled" else name


def is_stored(data: str) -> bool:
    """Whether DATA names a file of features rather than images."""
    return data.endswith((".safetensors", ".safetensors.index.json"))


def read_features(name: str) -> Stored:
    """The features of one file, or of all the files of its index. Maps are averaged over their patches.

    An image's class is the name of its folder. The folders must lie side by side: of x/cat/1.png and x/cat/more/2.png,
    the class may be cat or more.

    Raises:
        OSError, ValueError: no such file, one that `vit features` did not write, features that are not finite, or
            images in folders that do not lie side by side.
    """
    from safetensors import safe_open

    rows: list[Tensor] = []
    samples: list[Sample] = []
    skipped: list[str] = []
    found: dict[str, str] = {}
    for file in shards(Path(name)):
        about = read_metadata(file)
        if missing := {*SAME, "paths", "skipped"} - about.keys():
            raise ValueError(f"{file} was not written by vit features: its metadata has no {min(missing)}")
        check_same(file, about, found or about)
        found = about
        paths = json.loads(about["paths"])
        with safe_open(file, "pt") as opened:
            if about["kind"] == "dense":
                rows += [opened.get_tensor(path).float().mean(dim=(1, 2)) for path in paths]
            else:
                rows += opened.get_tensor("features").float()
        samples += [(Path(path), Path(path).parent.name) for path in paths]
        skipped += json.loads(about["skipped"]).values()
    check_folders(name, [path for path, _ in samples if isinstance(path, Path)])
    for (path, _), row in zip(samples, rows):
        if not row.isfinite().all():
            raise ValueError(f"the features of {path} in {name} are NaN or infinite: write them with --dtype float32")
    return Stored(Path(name), torch.stack(rows), samples, skipped, found)


def shards(file: Path) -> list[Path]:
    """The file itself, or those that its index lists; FileNotFoundError if there are neither."""
    index = file if file.name.endswith(".index.json") else index_of(file)
    if file != index and file.is_file():
        return [file]
    try:
        return [index.with_name(shard["file"]) for shard in json.loads(index.read_bytes())["shards"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"there is neither {file} nor {index}: is `vit features` finished?") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is not an index of features") from None


def check_same(file: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse features of another model or kind, or of images that were prepared differently."""
    for name in SAME:
        if found[name] != expected[name]:
            raise ValueError(f"the features of {file} differ in {name}: {found[name]}, not {expected[name]}")


def check_folders(name: str, paths: Iterable[Path]) -> None:
    """Refuse images whose folders are not classes for certain."""
    parents = sorted({path.parent.parent for path in paths})
    if not parents:
        raise ValueError(f"{name} has no features of images")
    if len(parents) > 1:
        raise ValueError(
            f"{name} has images in the folders of {parents[0]} and of {parents[1]}: the names of the images' folders"
            " are their classes, so they must lie side by side"
        )
