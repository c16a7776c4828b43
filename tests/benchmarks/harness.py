"""How this project measures: calls interleaved in one process, medians, and one contestant timed against itself."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from vit.cli import timing
from vit.files import replacing


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, title: str = "") -> dict[str, list[float]]:
    """Time each contestant `2 * rounds` times, in the order A B C C B A, so that drift affects all alike.

    Returns:
        Seconds per call, for each contestant.
    """
    for call in contestants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for _ in tqdm(range(rounds), desc=title, leave=False, disable=None):
        for name in names + names[::-1]:
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: dict[str, list[float]], reference: str) -> list[dict]:
    """A row per contestant: median and quartiles in ms, and the reference's median over its own (above 1: faster)."""
    base = statistics.median(seconds[reference])
    rows = []
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows.append({"name": name, "ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high, "ratio": base / median})
    return rows


def print_rows(title: str, rows: Sequence[dict], reference: str) -> None:
    """The rows as a table."""
    print(f"\n{title}")
    print(f"  {'':24} {'median ms':>10} {'quartiles':>17} {'times as fast as ' + reference:>28}")
    for row in rows:
        quartiles = f"{row['low']:.2f} - {row['high']:.2f}"
        print(f"  {row['name']:24} {row['ms']:10.2f} {quartiles:>17} {row['ratio']:28.3f}")


def environment() -> dict:
    """The machine and versions that a figure depends on."""
    return timing.environment(torch.device("cpu")) | {"threads": torch.get_num_threads()}


def write_json(path: Path | None, content: object) -> None:
    """Write the figures to `path`, if there is one, whole or not at all."""
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
