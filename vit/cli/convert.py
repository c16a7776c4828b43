"""`vit convert`: a checkpoint from one layout to another."""

import argparse
from typing import Any

import torch


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("convert", help="write a checkpoint in another layout")
    parser.add_argument("source", metavar="SRC", help="a name, a .safetensors file or a folder")
    parser.add_argument("target", metavar="DST", help="a .safetensors file, or a folder for model.safetensors")
    parser.add_argument("--to", required=True, metavar="LAYOUT", help="vit or timm")
    parser.add_argument("--force", action="store_true", help="replace what DST holds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, save, load again and compare."""
    from vit.weights.files import CheckpointError
    from vit.weights.load import load_pretrained
    from vit.weights.save import save_checkpoint, target_files

    files = target_files(args.target, args.to)
    existing = [str(file) for file in files if file.exists()]
    if existing and not args.force:
        raise ValueError(f"{' and '.join(existing)} exist: --force replaces them")
    model = load_pretrained(args.source)
    file = save_checkpoint(model, args.target, layout=args.to)
    again = load_pretrained(file)
    before, after = model.state_dict(), again.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise CheckpointError(f"{file} does not read back as it was written")
    assert model.provenance is not None and again.provenance is not None
    print(f"{model.provenance.layout} -> {args.to}: {len(before)} tensors, read back to the bit")
    print(f"from  {model.provenance.source}  sha256 {model.provenance.sha256}")
    for target in files:
        print(f"to    {target}" + (f"  sha256 {again.provenance.sha256}" if target == file else ""))
    return 0
