"""`vit inspect`: what a checkpoint holds, even if it cannot be loaded, and how two checkpoints differ."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vit.exporting.read import read_metadata

from . import export, options, runtime
from .convert import assumptions


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "inspect",
        help="show what a checkpoint holds, or how two differ",
        description="Show what a checkpoint holds; with two, how they differ, tensor by tensor and across layouts "
        "(exit code 1 if they differ).",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a name, a file or a folder")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a second checkpoint, to compare")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options.add_reading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tensors and, if they make up a model, its config; if not, raise CheckpointError after printing."""
    if runtime.is_ours(args.checkpoint) and args.other is None:
        return show_exported(args)
    reading = options.reading(args)
    overrides = {name: reading.pop(name) for name, _ in args.settings}
    if args.other is not None:
        return compare(args, overrides)
    return show(args, reading, overrides)


def show_exported(args: argparse.Namespace) -> int:
    """What an exported file says of itself."""
    metadata = read_metadata(Path(args.checkpoint))
    print(json.dumps(asdict(metadata), indent=2) if args.json else "\n".join(export.describe(metadata)))
    return 0


def show(args: argparse.Namespace, reading: dict[str, Any], overrides: dict[str, Any]) -> int:
    """One checkpoint."""
    from vit.weights import CheckpointError
    from vit.weights.description import assumed
    from vit.weights.load import find, load, read

    found = find(args.checkpoint)
    checkpoint = read(found)
    facts: dict[str, Any] = {
        "file": str(found.weights),
        "sha256": checkpoint.sha256,
        "commit": found.commit,
        "parameters": sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in checkpoint.tensors.items()
        },
        "metadata": dict(checkpoint.metadata),
    }
    problem = None
    try:
        loaded = load(found, **reading, overrides=overrides)
        config = loaded.ours.config
        facts |= {"layout": loaded.ours.layout.name, "why": loaded.ours.why}
        facts["config"] = {n: {"value": v, "from": config.sources.get(n, "")} for n, v in config.to_dict().items()}
        facts["preprocessing"] = asdict(loaded.attributes.preprocessing)
        names = loaded.attributes.categories
        facts["categories"] = {"count": len(names or ()), "from": loaded.attributes.categories_from}
        facts["assumed"] = assumed(config)
        facts["notes"] = loaded.ours.notes
    except CheckpointError as error:
        facts["problem"] = str(error)
        problem = CheckpointError(f"this cannot be loaded: {error}")
    print(json.dumps(facts) if args.json else as_text(facts), flush=True)
    if problem is not None:
        raise problem
    return 0


def as_text(facts: dict[str, Any]) -> str:
    """The facts as aligned lines: tensors first, the summary last."""
    tensors = facts["tensors"]
    width = max(map(len, tensors), default=0)
    lines = [
        f"{name:{width}}  {tensor['dtype']:9} {'x'.join(map(str, tensor['shape'])) or 'scalar'}"
        for name, tensor in tensors.items()
    ]
    lines.append("")
    for key in ("file", "layout", "why", "sha256", "commit"):
        if facts.get(key) is not None:
            lines.append(f"{key:14} {facts[key]}")
    lines.append(f"{'parameters':14} {facts['parameters']:,} in {len(tensors)} tensors")
    for name, entry in facts.get("config", {}).items():
        lines.append(f"{'config':14} {name} = {entry['value']}  ({entry['from']})")
    if "categories" in facts:
        count, whence = facts["categories"].values()
        lines.append(f"{'categories':14} {count}, {whence}" if count else f"{'categories':14} none")
    lines += [f"{'assumed':14} {line}" for line in assumptions(facts.get("assumed", {}))]
    lines += [f"{'note':14} {note}" for note in facts.get("notes", ())]
    for key in ("preprocessing", "metadata"):
        for name, value in facts.get(key, {}).items():
            lines.append(f"{key:14} {name} = {_short(value)}")
    return "\n".join(lines)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def compare(args: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Two checkpoints, in any layouts."""
    from vit.weights.load import find, load
    from vit.weights.verify import compare as compare_tensors
    from vit.weights.verify import compare_settings

    if args.layout or args.prefix or args.sha256:
        raise ValueError("--layout, --prefix and --sha256 are for one checkpoint, not for two")
    a, b = (load(find(name), overrides=overrides) for name in (args.checkpoint, args.other))
    rows, settings = compare_tensors(a, b), compare_settings(a, b)
    different = [row for row in rows if row.difference != 0.0 or row.remark]
    if args.json:
        print(json.dumps({"tensors": [asdict(row) for row in rows], "settings": settings}))
    else:
        print(f"{a.ours.layout.name} and {b.ours.layout.name}: {len(rows)} tensors, {len(different)} differ")
        for row in different:
            numbers = "" if row.difference is None else f"max|a-b| {row.difference:.1e}, relative {row.relative:.1e}"
            print(f"{row.name}  {numbers}{', ' * bool(numbers and row.remark)}{row.remark}")
        for name, (one, two, effect) in settings.items():
            print(f"{name}: {_short(one)} and {_short(two)} ({effect})")
    return 1 if different or settings else 0
