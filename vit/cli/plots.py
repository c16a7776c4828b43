"""Plots of measurements, drawn with matplotlib if it is installed."""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENDINGS = (".png", ".svg", ".pdf")


def check(file: Path) -> None:
    """Check that a plot can be drawn and written, before anything is computed.

    Raises:
        ValueError: another ending, no such folder, or no matplotlib.
    """
    if file.suffix.lower() not in ENDINGS or file.is_dir():
        raise ValueError(f"--plot must be a .png, .svg or .pdf file, got {file}")
    if not file.parent.is_dir():
        raise ValueError(f"--plot: the folder {file.parent} does not exist")
    figure_class()


def figure_class() -> Any:
    """matplotlib's Figure, which draws without a display; ValueError if matplotlib is not installed."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'vit-small[viz]'") from None


def speed(rows: Sequence[dict[str, Any]]) -> Any:
    """Images per second against the batch size, a line for each combination of the rest."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        height, width = row["size"]
        optimized = "optimized, " if row["optimize"] else ""
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        name = f"{height}x{width}, {optimized}{row['dtype']}, {row['attention']}, {threads}"
        lines.setdefault(name, []).append((row["batch"], row["images_per_s"]))
    figure = figure_class()(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(lines.items()):  # matplotlib has ten colours
        axes.plot(*zip(*sorted(points)), ("o-", "s--", "^:")[i // 10 % 3], label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches := sorted({row["batch"] for row in rows}), list(map(str, batches)))
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return add_legend(figure)


def accuracy(rows: Sequence[dict[str, Any]], patch_size: int, prefix_tokens: int) -> Any:
    """Top-1, with its interval, and top-5 against the side of a square with as many patches."""
    sides: dict[float, list[str]] = {}  # 32x48 and 48x32 share a tick
    points = []
    for row in rows:
        side = patch_size * math.sqrt(row["tokens"] - prefix_tokens)
        sides.setdefault(side, []).append(row["size"])
        low, high = row["interval"]
        points.append((side, 100 * row["top1"], 100 * (row["top1"] - low), 100 * (high - row["top1"]), row["top5"]))
    x, top1, below, above, top5 = zip(*sorted(points))
    figure = figure_class()(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, [100 * share for share in top5], "s--", color="0.6", label="top-5")
    axes.errorbar(x, top1, (below, above), fmt="o-", capsize=3, label="top-1, 95 % interval")
    axes.set_xticks(list(sides), ["\n".join(dict.fromkeys(names)) for names in sides.values()])
    axes.set_xlabel("image size")
    axes.set_ylabel("accuracy in %")
    axes.set_title(f"{Path(rows[0]['model']).name} on {Path(rows[0]['data']).name}")
    axes.grid(alpha=0.3)
    return add_legend(figure)


def curves(rows: Sequence[dict[str, Any]]) -> Any:
    """The log of a fine-tuning run: the loss of each step and of each validation, and the accuracy, against steps."""
    steps, checks = [row for row in rows if "loss" in row], [row for row in rows if "accuracy" in row]
    figure = figure_class()(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="0.7", label="training loss")
    at = [row["step"] for row in checks]
    axes.plot(at, [row["val_loss"] for row in checks], "s--", color="C1", label="validation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    shares = axes.twinx()
    shares.plot(at, [100 * row["accuracy"] for row in checks], "o-", color="C0", label="accuracy")
    shares.plot(at, [100 * row["balanced_accuracy"] for row in checks], "^:", color="C2", label="balanced accuracy")
    shares.set_ylabel("validation accuracy in %")
    shares.set_ylim(0, 102)  # room for markers at 100
    return add_legend(figure)


def add_legend(figure: Any) -> Any:
    """Put the legend below the axes and make the figure higher by as much, so that it covers no line."""
    columns = 2
    legend = figure.legend(loc="outside lower center", ncols=columns, fontsize="small")
    rows = math.ceil(len(legend.get_texts()) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)  # inches
    return figure


def save(figure: Any, file: Path) -> None:
    """Write a figure, in the format of the file's ending."""
    figure.savefig(file, dpi=150)
