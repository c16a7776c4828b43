"""`vit inspect`: what a checkpoint holds, whether or not it can be loaded."""

import argparse
import json
import math
from dataclasses import asdict
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("inspect", help="show what a checkpoint holds")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a name, a .safetensors file or a folder")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tensors and, where they make a model, its config; raises CheckpointError where they do not."""
    from vit.weights.convert import convert
    from vit.weights.files import CheckpointError
    from vit.weights.layouts import detect_layout
    from vit.weights.load import describe, find, read

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
        "metadata": checkpoint.metadata,
    }
    problem = None
    try:
        facts["layout"] = layout = detect_layout(checkpoint.tensors)
        about = describe(found, checkpoint, layout, {})
        facts["config"] = asdict(convert(checkpoint.tensors, layout, "vit", about.declared).config)
        if about.preprocessing is not None:
            facts["preprocessing"] = asdict(about.preprocessing)
    except CheckpointError as error:
        facts["problem"] = str(error)
        problem = CheckpointError(f"{found.weights} cannot be loaded: {error}")
    print(json.dumps(facts) if args.json else as_text(facts), flush=True)
    if problem is not None:
        raise problem
    return 0


def as_text(facts: dict[str, Any]) -> str:
    """The facts as aligned lines: tensors first, what sums them up last."""
    tensors = facts["tensors"]
    width = max(map(len, tensors), default=0)
    lines = [
        f"{name:{width}}  {tensor['dtype']:9} {'x'.join(map(str, tensor['shape'])) or 'scalar'}"
        for name, tensor in tensors.items()
    ]
    lines.append("")
    for key in ("file", "layout", "sha256", "commit"):
        if facts.get(key) is not None:
            lines.append(f"{key:14} {facts[key]}")
    lines.append(f"{'parameters':14} {facts['parameters']:,} in {len(tensors)} tensors")
    for key in ("config", "preprocessing", "metadata"):
        for name, value in facts.get(key, {}).items():
            text = str(value)
            lines.append(f"{key:14} {name} = {text if len(text) <= 80 else text[:77] + '...'}")
    return "\n".join(lines)
