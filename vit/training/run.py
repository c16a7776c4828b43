"""The folder of a run: one process at a time writes to it, and its log holds each step once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from vit.files import replacing

from .distributed import barrier, rank_and_world


class Folder:
    """A run's folder, locked while the block runs.

    Args:
        path: the folder; it is made if it does not exist.
        max_bad: unreadable images that are left out before the run stops.
        show: called with each line of the log, in the first process.

    Raises:
        ValueError: another process is running in it.
    """

    def __init__(self, path: Path, max_bad: int = 0, show: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path, self.max_bad, self.show = path, max_bad, show
        self.states, self.file = path / "state", path / "log.jsonl"
        self.main = rank_and_world()[0] == 0  # the process that writes
        self.bad: set[str] = set()

    def __enter__(self) -> Folder:
        import fcntl  # Windows has none

        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] | None = None
        if self.main:
            self._lock = (self.path / ".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
            except OSError:
                self._lock.close()
                raise ValueError(f"another run is at work in {self.path}: wait, or choose another folder") from None
        barrier()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
        if self.main and self.bad and error is None:
            print(f"{self.path}: unreadable images left out: {len(self.bad)}, named above", file=sys.stderr)

    def resume(self, step: int, steps: int) -> None:
        """Keep the lines of the log up to a step of `steps`: those after it will be written again."""
        if self.main and step:
            what = f"going on after step {step}" if step < steps else "already finished: nothing was trained"
            print(f"{self.path}: {what}", file=sys.stderr)
        if self.main and self.file.exists():
            lines = [line for line in self.file.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            with replacing(self.file) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def log(self, **record: Any) -> None:
        """Add a line to the log."""
        if self.main:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            if self.show is not None:
                self.show(record)

    def report(self, errors: set[str]) -> None:
        """List unreadable images, each once; ValueError if there are more than `max_bad`. The same in all processes."""
        for error in sorted(errors - self.bad) if self.main else ():
            print(f"left out: {error}", file=sys.stderr)
        self.bad |= errors
        if len(self.bad) > self.max_bad:
            raise ValueError(
                f"{len(self.bad)} images cannot be used, more than max_bad={self.max_bad} (--max-bad):"
                f" {', '.join(sorted(self.bad)[:3])}"
            )


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off when the run was killed
        return float("inf")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
