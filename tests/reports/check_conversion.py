"""Run a checkpoint, and what `vit convert` made of it, in their own libraries, and compare with both run here.

    python tests/reports/check_conversion.py SRC DST

All run on the same noise. The other libraries come with pip install -e ".[test]". The exit code is 2 if an output
differs by more than 1e-4 of the largest value, or if neither file can be run in another library.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from peers import check

from vit.cli import options
from vit.cli.convert import assumptions
from vit.weights.description import assumed
from vit.weights.load import find, load


def main(arguments: list[str] | None = None) -> int:
    """Print the differences; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="a name, a file or a folder: what was converted")
    parser.add_argument("result", metavar="DST", help="the file or folder that was written")
    options.add_reading(parser)
    args = parser.parse_args(arguments)
    reading = options.reading(args)
    overrides = {name: reading.pop(name) for name, _ in args.settings}
    try:
        source = load(find(args.source), **reading, overrides=overrides)
        rows, notes = check(source, load(find(args.result)))
    except (ValueError, OSError) as error:
        print(f"check_conversion: error: {error}", file=sys.stderr)
        return 2
    lines = [f"assumed     {line}" for line in assumptions(assumed(source.ours.config))]
    lines += [f"note        {note}" for note in notes]
    lines += [
        f"check       {what}: {found if isinstance(found, str) else f'{found:.1e}'}" for what, found in rows.items()
    ]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
