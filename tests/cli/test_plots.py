"""Plots: that they are drawn, that their legends cover nothing, and what is refused."""

import sys

import pytest
from PIL import Image

from vit.cli import evaluate, plots

DIGITS = "vit_digits_patch4_32"


def test_the_plot(tmp_path, labelled, rows):
    pytest.importorskip("matplotlib")
    file = tmp_path / "accuracy.png"
    code, found, _ = rows(labelled, "--model", DIGITS, "--img-size", "24,16x32,32x16,native", "--plot", file)
    assert code == 0 and len(found) == 4
    picture = Image.open(file)
    assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def bench_rows(count):
    """Rows of `vit bench` for so many lines of three batch sizes."""
    kinds = [(side, dtype) for side in range(1, count) for dtype in ("float32", "bfloat16")][:count]
    return [
        {"size": (16 * side, 16), "batch": batch, "optimize": None, "dtype": dtype, "attention": "sdpa", "threads": 8,
         "images_per_s": 100.0 * side + batch}
        for side, dtype in kinds for batch in (1, 2, 8)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [2, 5, 24])
def test_no_legend_covers_a_plot(count):
    pytest.importorskip("matplotlib")
    row = {"size": "32x32", "tokens": 65, "top1": 0.9, "top5": 1.0, "interval": (0.8, 0.95), "model": "m", "data": "d"}
    for figure, lines in ((plots.speed(bench_rows(count)), count), (plots.accuracy([row] * count, 4, 1), 2)):
        figure.draw_without_rendering()
        (legend,), (axes,) = figure.legends, figure.axes
        assert len(legend.get_texts()) == lines and axes.get_legend() is None
        box, covered = legend.get_window_extent(), axes.get_tightbbox()  # with the axes' labels and ticks
        assert not box.overlaps(covered)
        assert figure.bbox.y0 <= box.y0 and figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1  # nothing cut off
        assert axes.get_window_extent().height > 3 * figure.dpi  # nor is the plot squeezed: inches


def test_a_plot_without_matplotlib_is_refused_before_anything_is_computed(monkeypatch, rows):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(evaluate, "find_samples", lambda data: pytest.fail("it went on"))
    code, found, (error,) = rows("digits", "--model", DIGITS, "--plot", "accuracy.png")
    assert code == 2 and found == [] and "pip install 'vit-small[viz]'" in error
