"""Exported files that are damaged, contradict themselves or get other images than they take are refused."""

import json

import numpy as np
import pytest
import torch
from exporting_cases import EVERYTHING
from helpers import images, refused_in_one_line

import vit

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def test_sides_that_the_runtime_would_cut_off(exported):
    loaded = vit.load_exported(exported)
    ragged = images(1, 3, 30, 21)
    session = runtime.InferenceSession(str(exported))
    assert session.run(["logits"], {"images": ragged.numpy()})[0].shape == (1, 5)  # the control: in silence
    refused_in_one_line(lambda: loaded(ragged), r"multiples of 4; got \[1, 3, 30, 21\]")


@pytest.mark.parametrize(
    "wrong",
    [
        images(3, 28, 20), images(1, 1, 28, 20), images(0, 3, 28, 20), images(1, 3, 28, 20).double(),
        torch.zeros(1, 3, 28, 20, dtype=torch.uint8), np.zeros((1, 3, 28, 20), "float32"),
    ],
)  # fmt: skip
def test_other_images(wrong, exported):
    loaded = vit.load_exported(exported)
    refused_in_one_line(lambda: loaded(wrong), r"model.onnx expects \[B, 3, H, W\] images in float32")


def test_images_may_be_views_with_gradients(exported):
    loaded, x = vit.load_exported(exported), images(2, 3, 20, 28).transpose(2, 3).requires_grad_()
    assert torch.equal(loaded(x), loaded(x.detach().contiguous()))


def test_images_of_several_sizes_come_one_after_the_other(exported):
    loaded, parts = vit.load_exported(exported), [images(3, 28, 20), images(3, 8, 40)]
    assert torch.equal(loaded.forward_packed(parts), torch.cat([loaded(part[None]) for part in parts]))


def test_every_truncation_is_refused(exported, tmp_path):
    content = exported.read_bytes()
    for end in (0, 1, 100, len(content) // 2, len(content) - 1000, len(content) - 1):
        (tmp_path / "cut.onnx").write_bytes(content[:end])
        refused_in_one_line(lambda: vit.load_exported(tmp_path / "cut.onnx"), "cut.onnx")


def changed(exported, path, changes) -> None:
    """Write the file with other metadata; None takes a key out."""
    model = onnx.load(exported)
    found = {one.key: one.value for one in model.metadata_props} | changes
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {key: value for key, value in found.items() if value is not None})
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit.version": None}, "it has no metadata of `vit export`"),
        ({"vit.version": "2"}, "version 2, and this release reads version 1"),
        ({"vit.preprocessing": None}, "have no vit.preprocessing"),
        ({"vit.preprocessing": "{"}, "vit.preprocessing cannot be read"),
        ({"vit.preprocessing": '{"std": [0, 1, 1]}'}, "vit.preprocessing cannot be read: std must be above 0"),
        ({"vit.config": "[]"}, "vit.config cannot be read"),
        ({"vit.outputs": json.dumps(["features", "logits", "attention"])}, "describe features .* has logits"),
        ({"vit.outputs": json.dumps(["logits"])}, "its metadata describe images, logits, and its graph has images,"),
        ({"vit.size": "[28, 20]"}, r"describe images float32 \[any, 3, 28, 20\], and its graph has images .*any, any"),
        ({"vit.batch": "2"}, r"describe images float32 \[2, "),
    ],
)
def test_metadata_that_do_not_describe_the_graph(changes, message, exported, tmp_path):
    changed(exported, tmp_path / "other.onnx", changes)
    refused_in_one_line(lambda: vit.load_exported(tmp_path / "other.onnx"), message)


@pytest.mark.parametrize("change", [{"num_classes": 6}, {"num_heads": 4}, {"embed_dim": 32}])
def test_a_config_of_another_model(change, exported, tmp_path):
    config = vit.load_exported(exported).config.override(**change)
    changed(exported, tmp_path / "other.onnx", {"vit.config": json.dumps(config.to_dict())})
    refused_in_one_line(
        lambda: vit.load_exported(tmp_path / "other.onnx"), "and its graph has|5 categories for 6 classes"
    )


def test_an_unchanged_copy_is_read(exported, tmp_path):
    changed(exported, tmp_path / "copy.onnx", {})  # the control of the changes above
    assert vit.load_exported(tmp_path / "copy.onnx").metadata.outputs == EVERYTHING


def test_files_of_another_kind(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    refused_in_one_line(
        lambda: vit.load_exported(tmp_path / "model.safetensors"), "expected an exported file, .onnx or"
    )
    with pytest.raises(FileNotFoundError, match="no.onnx is not a file"):
        vit.load_exported(tmp_path / "no.onnx")


def test_an_output_that_the_file_does_not_give(model, tmp_path):
    vit.export(model, tmp_path / "model.onnx", img_size=8, outputs="features")
    loaded = vit.load_exported(tmp_path / "model.onnx")
    refused_in_one_line(lambda: loaded(images(1, 3, 8, 8)), "gives features, not logits: export it with --outputs")


def test_it_is_no_checkpoint(exported):
    with pytest.raises(vit.weights.CheckpointError, match="is an exported file: vit.load_exported runs it"):
        vit.load_pretrained(exported)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads, exported):
    loaded = vit.load_exported(exported, threads=threads)
    assert loaded.session.session.get_session_options().intra_op_num_threads == threads
