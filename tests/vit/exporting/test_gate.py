"""The gate finds what people have shipped by mistake; without the mistake it passes."""

from dataclasses import replace

import pytest
from exporting_cases import freeze_positions, small

import vit
from vit.exporting import ParityError, write
from vit.exporting.gate import judge
from vit.exporting.graph import Graph


def rows(monkeypatch, tmp_path, **settings):
    """The gate's rows of an export, whatever it thinks of them."""
    monkeypatch.setattr(write.gate, "judge", lambda rows: None)
    return vit.export(small(), tmp_path / "model.onnx", force=True, **settings).metadata.parity


def refused(monkeypatch, tmp_path, **settings) -> dict[str, float]:
    """The errors by input; asserts that the gate refuses them."""
    found = rows(monkeypatch, tmp_path, **settings)
    monkeypatch.undo()
    with pytest.raises(ParityError, match=r"differ from the model's by .* of the largest, more than 1e-05"):
        judge(found)
    return {row["input"]: row["value"] for row in found}


def test_it_passes_a_right_one(monkeypatch, tmp_path):
    judge(rows(monkeypatch, tmp_path, img_size=(28, 20)))


def test_frozen_positions(monkeypatch, tmp_path):
    freeze_positions(monkeypatch)
    errors = refused(monkeypatch, tmp_path)
    assert errors["noise 3 x 28 x 20"] <= 1e-5
    assert errors["noise 2 x 16 x 40"] > 1e-3


@pytest.mark.parametrize("change", [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.2, 0.2, 0.2)}, {"interpolation": "bilinear"}])
def test_wrong_preprocessing(change, monkeypatch, tmp_path):
    real = write.Metadata
    monkeypatch.setattr(
        write, "Metadata", lambda preprocessing, **more: real(preprocessing=replace(preprocessing, **change), **more)
    )
    errors = refused(monkeypatch, tmp_path, img_size=(28, 20))
    photograph = errors.popitem()
    assert photograph[0].startswith("the photograph") and photograph[1] > 1e-4
    assert max(errors.values()) <= 1e-5  # only a photograph can show it


def test_channels_in_the_wrong_order(monkeypatch, tmp_path):
    real = Graph.forward
    monkeypatch.setattr(Graph, "forward", lambda self, images: real(self, images.flip(1)))
    assert min(refused(monkeypatch, tmp_path, img_size=8).values()) > 1e-3


def test_results_that_are_not_numbers():
    row = {"input": "noise", "output": "logits", "measure": "error", "bar": 1e-5}
    judge([row | {"value": 1e-5}])
    with pytest.raises(ParityError, match="by nan"):
        judge([row | {"value": float("nan")}])
