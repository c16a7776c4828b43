"""Conversions from file to file that prove what they did, and checkpoints compared across layouts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError
from .convert import Converted
from .description import Attributes, assumed
from .load import WEIGHT_FILES, Loaded, build, find, load
from .peers import NoPeer, build_peer, peer_library
from .save import effect, target_files, write

# A check fails beyond this difference, relative to the largest value; float32 leaves 1e-6 to 1e-5.
BAR = 1e-4


@dataclass(frozen=True)
class Compared:
    """One parameter in two checkpoints."""

    name: str  # ours
    difference: float | None  # max|a - b|; None where it is in one of them alone, or in different shapes
    relative: float | None  # the same over max|b|
    remark: str = ""


def convert_file(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    check: bool = False,
    revision: str | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Convert a checkpoint, read the result back, and write a report beside it.

    The result takes its name only after it was read back and compared to the bit; what was there before stays
    otherwise, also where `check` finds no library to run.

    Args:
        source: as `load_pretrained` takes it.
        target: the file or folder to write, as `save_checkpoint` takes it.
        to: the layout to write.
        check: run the source in its own library, the result in ours and in its own, and report the differences. A
            half that has no library (this project's own layout, one that is not installed) is reported as not run.
        revision: of the source, on the Hub.
        reading: layout, prefix, sha256, overrides and categories, as `vit.weights.load.load` takes them.

    Returns:
        The report, which is also written as JSON: <file>.report.json.

    Raises:
        CheckpointError: as `load_pretrained` and `save_checkpoint`; with `check` also for a difference beyond `BAR`,
            for a source that its own library does not take, or where neither half can be run.
    """
    files = target_files(target, to)
    loaded = load(find(source, revision), **reading)
    checked = _check(loaded, files[0].name, to) if check else None
    reports: list[dict[str, Any]] = []

    def report(converted: Converted, sha256: str) -> dict[str, Any]:
        details = converted.report.to_dict()
        reports.append(_report(loaded, details, [str(file) for file in files], sha256, checked))
        return reports[0]

    write(loaded.ours, loaded.attributes, files[0], to, lambda: loaded.provenance, report)
    return reports[0]


def _report(
    loaded: Loaded, details: dict[str, Any], files: list[str], sha256: str, checked: dict[str, float | str] | None
) -> dict[str, Any]:
    config, provenance = loaded.ours.config, loaded.provenance
    if checked is not None and assumed(config) and not _has_loader(loaded):
        details["notes"].append("both sides of the check ran with what is assumed, so that it does not prove that")
    used = sorted({name for step in details["steps"] for name in step["transforms"]})
    return {
        "source": {"file": provenance.source, "sha256": provenance.sha256, "layout": details.pop("source"),
                   "why": details.pop("why"), "prefix": details.pop("prefix")},
        "target": {"files": files, "sha256": sha256, "layout": details.pop("target")},
        "tensors": len(details["steps"]),
        "transforms": used,
        "round_trip": "read back and compared: every tensor equal to the bit",
        "check": checked,
        "config": {name: {"value": value, "from": config.sources.get(name, "")}
                   for name, value in config.to_dict().items()},
        **details,
    }  # fmt: skip


def fixed_images(config: Any) -> Tensor:
    """The input of every check: two images [2, C, H, W] of the model's own size, of normal noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, config.in_chans, *config.img_size, generator=generator)


@torch.inference_mode()
def _check(loaded: Loaded, name: str, to: str) -> dict[str, float | str]:
    """The source in its own library, and the result in ours and its own, against the source in our model.

    The result is written into a folder that goes again, and read as anybody would read it: with what its readers
    assume where its files cannot say something.

    Returns:
        What ran against what -> the largest difference over the largest value, or "not run: " and why.

    Raises:
        CheckpointError: a difference beyond `BAR`, a library that does not take the weights, or neither side's there.
    """
    images = fixed_images(loaded.ours.config)
    expected = _forward(loaded, images)
    source = _in_its_library(loaded, loaded.ours.layout.name, loaded.ours.theirs, images, expected)
    results: dict[str, float | str] = {f"source in {_library(loaded.ours.layout.name)} against source in vit": source}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / name
        converted = write(loaded.ours, loaded.attributes, file, to, lambda: loaded.provenance)
        result = load(find(file))
        results["result in vit against source in vit"] = _difference(_forward(result, images), expected)
        its_own = _in_its_library(result, to, result.checkpoint.tensors, images, expected)
        results[f"result in {_library(to)} against source in vit"] = its_own
    if isinstance(source, str) and isinstance(its_own, str):
        raise CheckpointError(f"there is nothing to check against: {'; '.join(dict.fromkeys([source, its_own]))}")
    _hold_to_bar(results, converted)
    return {what: f"not run: {found}" if isinstance(found, str) else found for what, found in results.items()}


def _library(layout: str) -> str:
    return "its own library" if layout == "vit" else peer_library(layout)


def _in_its_library(
    loaded: Loaded, layout: str, state: Mapping[str, Tensor], images: Tensor, expected: Tensor
) -> float | str:
    """How far the library that a layout is from differs from what is expected; or why it cannot be run."""
    folder = loaded.checkpoint.path.parent if _has_loader(loaded) else None
    try:
        peer = build_peer(layout, _floats(state), loaded.ours.config, folder)
    except NoPeer as error:
        return str(error)
    return _difference(peer(images), expected)


def _hold_to_bar(results: Mapping[str, float | str], converted: Converted) -> None:
    """CheckpointError for a difference beyond `BAR`, with the settings that the result cannot say."""
    config = converted.config
    unsaid = [
        f"{field} {getattr(config, field)!r}, which its reader takes to be {value!r}"
        for field, value in converted.report.unsaid.items()
        if field in config.field_names()
    ]
    for what, difference in results.items():
        if isinstance(difference, str) or difference <= BAR:
            continue
        cause = ""
        if unsaid and what.startswith("result"):
            cause = f"; the result cannot say {' nor '.join(unsaid)} (without --check it is written all the same)"
        raise CheckpointError(
            f"{what}: the largest difference is {difference:.1e} of the largest value, expected at most "
            f"{BAR:.0e}{cause}; nothing was written"
        )


def _has_loader(loaded: Loaded) -> bool:
    """Are these the files of timm or transformers, in a folder that their own loaders read?"""
    name = loaded.ours.layout.name
    ours = loaded.found.config is None or bool(loaded.ours.prefix)
    known = name in ("timm", "deit") or (name.startswith("transformers") and not name.endswith("_memory"))
    return known and not ours and loaded.checkpoint.path.name in WEIGHT_FILES


def _forward(loaded: Loaded, images: Tensor) -> Tensor:
    model = build(loaded).float().eval()
    return model(images) if loaded.ours.config.num_classes else model.forward_features(images)


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in state.items()}


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(a: Loaded, b: Loaded) -> list[Compared]:
    """Two checkpoints, tensor by tensor in our names, whatever their layouts."""
    one, two = a.ours.tensors, b.ours.tensors
    rows = []
    for name in dict.fromkeys([*one, *two]):
        if name not in one or name not in two:
            rows.append(Compared(name, None, None, f"only in the {'first' if name in one else 'second'}"))
        elif one[name].shape != two[name].shape:
            shapes = f"{list(one[name].shape)} and {list(two[name].shape)}"
            rows.append(Compared(name, None, None, f"shapes differ: {shapes}"))
        else:
            largest = (one[name].double() - two[name].double()).abs().max().item()
            remark = "" if one[name].dtype == two[name].dtype else f"{one[name].dtype} and {two[name].dtype}"
            rows.append(Compared(name, largest, largest / max(two[name].abs().max().item(), 1e-45), remark))
    return rows


# Settings that change no answer of a model with these weights, and those that change only some.
_NO_EFFECT = dict.fromkeys(("init_values", "drop_path_rate", "grad_checkpointing"), "changes no result")
_SOME_EFFECT = {
    "position_rule": "changes results at other sizes than the weights' own",
    "categories": "changes the names of the classes",
}


def compare_settings(a: Loaded, b: Loaded) -> dict[str, tuple[Any, Any, str]]:
    """The settings in which two checkpoints differ, and whether that changes a result."""
    effects = _NO_EFFECT | _SOME_EFFECT
    one, two = (loaded.ours.config.to_dict() | _attributes(loaded.attributes) for loaded in (a, b))
    if effect(a.attributes.preprocessing)[-1] == effect(b.attributes.preprocessing)[-1]:  # 0.9 and 0.9032 of 224 px
        one.pop("preprocessing.crop_pct")
    return {
        name: (one[name], two[name], effects.get(name, "changes results")) for name in one if one[name] != two[name]
    }


def _attributes(attributes: Attributes) -> dict[str, Any]:
    return {f"preprocessing.{key}": value for key, value in asdict(attributes.preprocessing).items()} | {
        "categories": attributes.categories
    }
