"""The command line: `vit demo | predict | finetune | probe | features | evaluate | bench | ...`."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn

from . import attention, bench, convert, demo, evaluate, export, features, finetune, inspect, predict, probe

EXAMPLES = """\
vit demo                                      classify bundled digits and draw attention; needs no network
vit predict photo.jpg --img-size native       name what is in a photograph, at its own size and proportions
vit finetune photos/ -o run/                  train it on your own classes, one folder per class
vit export MODEL -o model.onnx                write it for another runtime, checked against the model there
vit attention a.jpg b.jpg -o attention.png    draw where each head of the last block looks
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 for success; 1 if some inputs were skipped, or if `inspect` found differences; 2 for bad input,
        with one line on stderr; 130 if interrupted.
    """
    args = make_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with one_line_warnings(args.command):
            code: int = args.run(args)
        print(end="", flush=True)  # here, where a closed pipe and a full disk are handled
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        return 0
    except (ValueError, OSError) as error:  # what this package raises for bad input; anything else is a bug
        print(f"vit {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vit {args.command}: interrupted", file=sys.stderr)
        return 130
    finally:
        drop_unwritable()


def drop_unwritable() -> None:
    """Write what `print` still holds, or drop it: the interpreter's end would fail on it with another exit code."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def one_line_warnings(command: str) -> Iterator[None]:
    """Print this package's warnings, plain UserWarnings, as one line: the command and the message, no source line."""
    before = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is not UserWarning:  # of other packages
            return before(message, category, *place, **line)
        return f"vit {command}: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with errors on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Report unknown arguments in the name of the command; argparse would report them in the name of `vit`."""
        found, others = super().parse_known_args(args, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return found, others


class _TopParser(_Parser):
    """The parser of `vit` itself, whose help opens with examples."""

    def format_help(self) -> str:
        return EXAMPLES + "\n" + super().format_help()


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _TopParser(prog="vit", description="A Vision Transformer Small in plain PyTorch.")
    parser.add_argument("--version", action="version", version=version("vit-small"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for module in (demo, predict, finetune, probe, features, evaluate, bench, attention, inspect, convert, export):
        module.add_parser(commands)
    return parser
