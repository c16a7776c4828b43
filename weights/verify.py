"""Conversions from file to file, proven by reading the result back, and comparisons across layouts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .convert import Converted
from .description import Attributes
from .load import Loaded, load
from .save import effect, target_files, write
from .source import find


@dataclass(frozen=True)
class Compared:
    """One parameter in two checkpoints."""

    name: str  # ours
    difference: float | None  # max|a - b|; None if it is only in one of them, or the shapes differ
    relative: float | None  # the same over max|b|
    remark: str = ""


def convert_file(
    source: str | Path, target: str | Path, to: str, *, revision: str | None = None, **reading: Any
) -> dict[str, Any]:
    """Convert a checkpoint, read the result back, and write a report beside it.

    The result gets its name only after it was read back and compared bit for bit; until then, an existing file stays.

    Args:
        source: as for `load_pretrained`.
        target: the file or folder to write, as for `save_checkpoint`.
        to: the layout to write.
        revision: of the source, on the Hub.
        reading: layout, prefix, sha256, overrides and categories, as for `vit.weights.load.load`.

    Returns:
        The report, which is also written as JSON: <file>.report.json.

    Raises:
        CheckpointError: as `load_pretrained` and `save_checkpoint`.
    """
    files = target_files(target, to)
    loaded = load(find(source, revision), **reading)
    reports: list[dict[str, Any]] = []

    def report(converted: Converted, sha256: str) -> dict[str, Any]:
        reports.append(_report(loaded, converted.report.to_dict(), [str(file) for file in files], sha256))
        return reports[0]

    write(loaded.ours, loaded.attributes, files[0], to, lambda: loaded.provenance, report)
    return reports[0]


def _report(loaded: Loaded, details: dict[str, Any], files: list[str], sha256: str) -> dict[str, Any]:
    config, provenance = loaded.ours.config, loaded.provenance
    return {
        "source": {"file": provenance.source, "sha256": provenance.sha256, "layout": details.pop("source"),
                   "why": details.pop("why"), "prefix": details.pop("prefix")},
        "target": {"files": files, "sha256": sha256, "layout": details.pop("target")},
        "tensors": len(details["steps"]),
        "transforms": sorted({name for step in details["steps"] for name in step["transforms"]}),
        "round_trip": "read back and compared: every tensor equal bit for bit",
        "config": {name: {"value": value, "from": config.sources.get(name, "")}
                   for name, value in config.to_dict().items()},
        **details,
    }  # fmt: skip


def compare(a: Loaded, b: Loaded) -> list[Compared]:
    """Compare two checkpoints in any layouts, tensor by tensor, in our names."""
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


# Settings that change no result of a model with these weights, and those that change only some results.
_NO_EFFECT = dict.fromkeys(("init_values", "drop_path_rate", "grad_checkpointing"), "changes no result")
_SOME_EFFECT = {
    "position_rule": "changes results at other sizes than the weights' own",
    "categories": "changes the names of the classes",
}


def compare_settings(a: Loaded, b: Loaded) -> dict[str, tuple[Any, Any, str]]:
    """The settings that differ between two checkpoints -> both values, and whether the difference changes results."""
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
