"""Core ML: the package is written and says what it takes; nothing here can run it."""

import pytest
from exporting_cases import EVERYTHING, small
from helpers import refused_in_one_line

import vit
from vit.cli.export import as_text
from vit.exporting import to_coreml

tools = pytest.importorskip("coremltools")


def spec_of(path):
    return tools.models.MLModel(str(path), skip_model_load=True)


@pytest.mark.parametrize("precision", ["float32", "half", "int8"])
def test_tensors(precision, tmp_path):
    options = {} if precision == "float32" else {precision: True}
    report = vit.export(
        small(), tmp_path / "model.mlpackage", "coreml", img_size=(20, 28), outputs=("logits", "attention"), **options
    )
    assert report.files[0] == str(tmp_path / "model.mlpackage") and len(report.files) == 4
    assert report.metadata.parity is None and "converted, never run" in as_text(report)
    package = spec_of(tmp_path / "model.mlpackage")
    about = package.get_spec().description
    assert [(one.name, list(one.type.multiArrayType.shape)) for one in about.input] == [("images", [1, 3, 20, 28])]
    assert [one.name for one in about.output] == ["logits", "attention"]
    metadata = vit.exporting.Metadata.from_strings(package.user_defined_metadata)
    assert metadata == report.metadata and metadata.parity is None


def test_pictures_in_and_labels_out(tmp_path):
    vit.export(small(), tmp_path / "model.mlpackage", "coreml", input="uint8", img_size=(20, 28))
    about = spec_of(tmp_path / "model.mlpackage").get_spec().description
    (picture,) = about.input
    assert (picture.type.imageType.height, picture.type.imageType.width) == (20, 28)
    assert about.predictedFeatureName == "classLabel"
    assert {one.name for one in about.output} == {"classLabel", "classLabel_probs"}


def test_a_single_class_stays_a_logit(tmp_path):
    vit.export(small(num_classes=1), tmp_path / "model.mlpackage", "coreml", input="uint8", img_size=(20, 28))
    about = spec_of(tmp_path / "model.mlpackage").get_spec().description
    assert [one.name for one in about.output] == ["logits"] and not about.predictedFeatureName


def test_every_class_has_a_label_of_its_own(tmp_path):
    model = small()
    model.categories = ["owl", "crane", "wren", "crane", "crane (1)"]
    report = vit.export(model, tmp_path / "model.mlpackage", "coreml", input="uint8", img_size=(20, 28))
    (function,) = spec_of(tmp_path / "model.mlpackage").get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    (classify,) = [one for one in block.operations if one.type == "classify"]
    values = classify.inputs["classes"].arguments[0].value.immediateValue.list.values
    found = [one.immediateValue.tensor.strings.values[0] for one in values]
    assert found == ["owl", "crane (1) (1)", "wren", "crane (3)", "crane (1) (4)"]
    assert report.metadata.categories == model.categories  # which are as they were


def test_labels_get_numbers_until_they_differ():
    assert to_coreml.unique(["a", "b"]) == ["a", "b"]
    assert to_coreml.unique(["crane", "owl", "crane"]) == ["crane (0)", "owl", "crane (2)"]
    assert len(set(to_coreml.unique(["a", "a", "a (0)", "a (0) (0)", "a (0)", "a (1)"]))) == 6


@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 4}])
def test_without_a_position_of_the_class_token(settings, tmp_path):
    model = small(class_position=False, **settings)
    vit.export(model, tmp_path / "model.mlpackage", "coreml", img_size=(20, 28), outputs=EVERYTHING)
    about = spec_of(tmp_path / "model.mlpackage").get_spec().description
    assert [one.name for one in about.output] == list(EVERYTHING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic": True}, r"--dynamic \(dynamic=True\) with coreml: it has one size a file: export several"),
        ({"input": "image"}, "--input image .* with coreml: it takes float32, uint8"),
        ({"input": "uint8", "batch_size": 2}, "one picture a call, not batch_size=2"),
    ],
)
def test_what_it_does_not_take(options, message, tmp_path):
    refused_in_one_line(lambda: vit.export(small(), tmp_path / "model.mlpackage", "coreml", **options), message)
    assert not list(tmp_path.iterdir())
