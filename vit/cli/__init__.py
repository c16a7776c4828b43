"""The command line: `vit demo | predict | features | evaluate | bench | attention | inspect | convert`."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn

from . import attention, bench, convert, demo, evaluate, features, inspect, predict


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 where all went well; 1 where some inputs were skipped; 2 on bad input, with one line on stderr; 130 where
        it was interrupted.
    """
    args = make_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with one_line_warnings(args.command):
            return args.run(args)
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # what this package raises for bad input; anything else is a bug and shows
        print(f"vit {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vit {args.command}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def one_line_warnings(command: str) -> Iterator[None]:
    """Plain warnings, as this package's are, in the command's name and without the line that they come from."""
    before = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is not UserWarning:  # other packages' own
            return before(message, category, *place, **line)
        return f"vit {command}: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


class _Parser(argparse.ArgumentParser):
    """argparse's, with one line for an error instead of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is not known here, in the command's name: argparse's commands leave it to the parser of all."""
        found, others = super().parse_known_args(args, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return found, others


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(prog="vit", description="A Vision Transformer Small in plain PyTorch.")
    parser.add_argument("--version", action="version", version=version("vit-small"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, predict, features, evaluate, bench, attention, inspect, convert):
        module.add_parser(commands)
    return parser
