"""Curves, drawn with matplotlib where it is installed."""

import importlib
from pathlib import Path
from typing import Any

PLOTS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Before anything is computed: can the plot be drawn, and can it be written?

    Raises:
        ValueError: no matplotlib, another ending, or no folder to write to.
    """
    if file.suffix.lower() not in PLOTS or file.is_dir():
        raise ValueError(f"--plot must be a .png, .svg or .pdf file, not {file}")
    if not file.parent.is_dir():
        raise ValueError(f"--plot: there is no folder {file.parent}")
    figure_class()


def figure_class() -> Any:
    """matplotlib's Figure, which is drawn without a display; ValueError where matplotlib is not installed."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'vit-small[viz]'") from None
