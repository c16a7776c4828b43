"""`vit convert`: a checkpoint from one layout to another, with a report of what was done."""

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from . import loading, options


class _Check(argparse.Action):
    """Say where the former option --check went, before argparse asks for what else is missing."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> NoReturn:
        script = f"python tests/reports/check_conversion.py {namespace.source or 'SRC'} {namespace.target or 'DST'}"
        parser.error(f"--check is no longer an option: convert without it, then run `{script}` in a clone")


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("convert", help="write a checkpoint in another layout")
    parser.add_argument("source", metavar="SRC", help="a name, a file or a folder")
    parser.add_argument("target", metavar="DST", help="a .safetensors or .npz file, or a folder for model.safetensors")
    parser.add_argument(
        "--to", required=True, metavar="LAYOUT", help="vit, timm, transformers, torchvision, augreg ..."
    )
    parser.add_argument("--force", action="store_true", help="replace what DST holds")
    parser.add_argument("--check", action=_Check, nargs=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the whole report, which is also written beside DST")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="the names of the classes, one per line")
    options.add_reading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print the report."""
    from vit.weights.layouts.vit import NOT_A_CHECKPOINT
    from vit.weights.save import report_path, target_files
    from vit.weights.verify import convert_file

    if loading.is_optimized_file(args.source):
        raise ValueError(f"{args.source}: {NOT_A_CHECKPOINT}")
    files = target_files(args.target, args.to)
    existing = [str(file) for file in files if file.exists()]
    if existing and not args.force:
        raise ValueError(f"{' and '.join(existing)} exist{'s' * (len(existing) == 1)}: --force replaces them")
    reading = options.reading(args)
    overrides = {name: reading.pop(name) for name, _ in args.settings}
    reading |= {"overrides": overrides, "categories": None if args.labels is None else labels(args.labels)}
    report = convert_file(args.source, args.target, args.to, **reading)
    print(json.dumps(report, indent=2) if args.json else as_text(report, report_path(files[0])))
    return 0


def labels(file: Path) -> list[str]:
    """One name per line; ValueError for a file that holds something else."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels {file} is not UTF-8 text: {error}") from None
    if "" in names:
        raise ValueError(f"--labels {file}: line {names.index('') + 1} is empty")
    return names


def assumptions(assumed: dict[str, dict[str, Any]]) -> list[str]:
    """The settings that nothing states, one line for each place that their values come from."""
    grouped: dict[str, list[str]] = {}
    for name, entry in assumed.items():
        grouped.setdefault(entry["from"], []).append(f"{name} {entry['value']}")
    return [
        f"{', '.join(fields)} ({whose.replace('default', 'defaults' if len(fields) > 1 else 'default', 1)}; "
        f"override with --set {fields[0].split()[0]}=...)"
        for whose, fields in grouped.items()
    ]


def as_text(report: dict[str, Any], file: Path) -> str:
    """The report in lines: what was read and why, what was done, what was written."""
    source, target = report["source"], report["target"]
    lines = [
        f"{source['layout']} -> {target['layout']}: {report['tensors']} tensors, {report['round_trip']}",
        f"from        {source['file']}  sha256 {source['sha256']}",
        *(f"to          {name}" + f"  sha256 {target['sha256']}" * (i == 0) for i, name in enumerate(target["files"])),
        f"layout      {source['layout']}: {source['why']}",
        f"transforms  {'; '.join(report['transforms']) or 'none: names only'}",
    ]
    lines += [f"dropped     {key}: {why}" for key, why in report["dropped"].items()]
    if report["left"]:
        lines.append(f"left        {len(report['left'])} keys outside the model: {', '.join(report['left'][:5])} ...")
    lines += [f"assumed     {line}" for line in assumptions(report["assumed"])]
    lines += [f"note        {note}" for note in report["notes"]]
    lines += [f"not stored  {name}: readers will assume {value}" for name, value in report["unsaid"].items()]
    return "\n".join([*lines, f"report      {file}"])
