"""LiteRT gives what the model gives; its converter needs an environment of its own, and says so."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from exporting_cases import EVERYTHING, small
from helpers import FLOAT32, difference, images, refused_in_one_line
from torch.nn.functional import cosine_similarity

import vit
from vit.resources import digit_images

CONVERTER = importlib.util.find_spec("litert_torch") is not None
needs_converter = pytest.mark.skipif(not CONVERTER, reason="needs litert_torch")


@pytest.mark.skipif(CONVERTER, reason="litert_torch is here")
def test_without_the_converter_the_environment_is_spelled_out(tmp_path):
    refused_in_one_line(
        lambda: vit.export(small(), tmp_path / "model.tflite", "litert"),
        r"litert_torch is missing: .* torch below 2.15, .* litert/bin/pip install -e '.\[litert\]'",
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dynamic": True}, r"--dynamic \(dynamic=True\) with litert: it has one size a file: export several"),
        ({"half": True}, "--half"),
        ({"opset": 20}, "--opset"),
    ],
)
def test_options_that_it_does_not_take(option, message, tmp_path):
    refused_in_one_line(lambda: vit.export(small(), tmp_path / "model.tflite", "litert", **option), message)


@needs_converter
@pytest.mark.parametrize("size", [(28, 20), (20, 28)])
def test_float32(size, tmp_path):
    model, x = small(), images(3, 3, *size)
    vit.export(model, tmp_path / "model.tflite", "litert", img_size=size, batch_size=2, outputs=EVERYTHING)
    loaded = vit.load_exported(tmp_path / "model.tflite", threads=1)
    found, wanted = loaded.run(x), vit.exporting.gate.reference(model, x, EVERYTHING)
    assert all(difference(found[name], wanted[name]) <= FLOAT32 for name in EVERYTHING)
    assert loaded.metadata.size == size and loaded.categories == model.categories
    content = (tmp_path / "model.tflite").read_bytes()
    assert str(tmp_path).encode() not in content and b"site-packages" not in content
    for end in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.tflite").write_bytes(content[:end])
        refused_in_one_line(lambda: vit.load_exported(tmp_path / "cut.tflite"), "cut.tflite is cut short")


@needs_converter
def test_threads_get_their_own_answers(tmp_path):
    vit.export(small(), tmp_path / "model.tflite", img_size=28, outputs=EVERYTHING)
    loaded = vit.load_exported(tmp_path / "model.tflite", threads=1)
    several = [images(1, 3, 28, 28, seed=i) for i in range(100)]
    wanted = [loaded(one) for one in several]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(loaded, several), wanted):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@needs_converter
def test_int8(tmp_path):
    model = vit.load_pretrained("vit_digits_patch4_32")
    transform = vit.create_transform(model)
    x = torch.stack([transform(image) for image in digit_images()[0][:100]])
    report = vit.export(model, tmp_path / "model.tflite", "litert", int8=True, calibrate=x)
    loaded = vit.load_exported(tmp_path / "model.tflite")
    with torch.no_grad():
        assert cosine_similarity(loaded(x), model(x)).min() > 0.998
        assert difference(loaded(x), model(x)) > 1e-4  # the control
    assert report.bytes < 1.2e6 and report.metadata.precision == "int8"
