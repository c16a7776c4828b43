"""A model that was exported once for several tests."""

import pytest
from exporting_cases import EVERYTHING, small

import vit

pytest.importorskip("onnxscript")


@pytest.fixture(scope="session")
def model():
    return small()


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory):
    """The path of a dynamic ONNX file with all outputs."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    vit.export(model, path, outputs=EVERYTHING)
    return path
