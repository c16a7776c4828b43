"""Files that take pixels: they prepare pictures as `vit.create_transform` does, and the gate sees when they do not."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exporting_cases import EVERYTHING, small
from helpers import difference, refused_in_one_line
from torch.nn.functional import cosine_similarity, interpolate

import vit
import vit.image
from vit.exporting import ParityError, gate, pixels
from vit.image import Transform, load_image
from vit.resources import DATA, digit_images

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
PHOTOGRAPH = load_image(DATA / "photographs" / "coffee.jpg")
SIZES = [(300, 451), (100, 60), (28, 20), (17, 90), (641, 480), (5, 7), (1, 1)]  # of pictures, (H, W)
FORMATS = ["onnx", "openvino"]


def picture(size, mode="RGB"):
    return PHOTOGRAPH.convert(mode).resize(size[::-1])


def as_batch(image):
    return torch.from_numpy(np.array(image).reshape(1, image.height, image.width, -1))


@pytest.mark.parametrize("interpolation", pixels.FILTERS)
@pytest.mark.parametrize(("mode", "crop_pct"), [("crop", 0.9), ("crop", 1.0), ("squash", 1.0)])
@pytest.mark.parametrize("size", [(28, 28), (28, 20), (20, 36)])
def test_a_resize_is_pillows_to_a_grey_level(size, mode, crop_pct, interpolation):
    settings = vit.Preprocessing(size, interpolation=interpolation, mode=mode, crop_pct=crop_pct)
    transform = Transform(mode, size, 4, settings.mean, settings.std, interpolation, crop_pct)
    for shape in SIZES:
        image = picture(shape)
        found = pixels.resize(as_batch(image), settings, size, 4)[0].permute(1, 2, 0)
        wanted = torch.from_numpy(np.array(transform.view(image))).float()
        rows_first = mode == "squash" and shape[0] - size[0] > max(0, 2 * (shape[1] - size[1]))  # in Pillow 13
        assert (found - wanted).abs().max() <= (5 if rows_first else 1), shape
        if not rows_first:
            assert (found != wanted).float().mean() <= 0.05, shape  # halves, which a triangle meets


def test_only_the_samples_around_a_patch_are_read():
    """So that the product of a large picture stays small."""
    rows, columns = pixels.plan(vit.Preprocessing(), 1080, 1920, (224, 224))
    assert (rows, columns) == (pixels.Axis(1080, 248, 12, 224), pixels.Axis(1920, 440, 108, 224))
    read = []
    x = torch.zeros(1, 1920, 1, dtype=torch.uint8)

    class Watched(torch.Tensor):
        def __getitem__(self, index):
            read.append(index[1].shape)
            return super().__getitem__(index).as_subclass(torch.Tensor)

    pixels.resample(x.as_subclass(Watched), columns, 16, pixels.FILTERS["bicubic"])
    assert read == [(14, 109)]  # of 1920


def test_rounding_is_pythons():
    for a in range(60):
        for b in range(1, 20):
            assert pixels.rounded(a, b) == round(a / b)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("uint8", {}),
        pytest.param("uint8", {"half": True}, marks=pytest.mark.slow),
        ("image", {}),
        ("image", {"img_size": (20, 28), "batch_size": 2, "half": True}),
    ],
)
def test_pictures_in_answers_out(kind, settings, form, tmp_path):
    if form == "openvino":
        pytest.importorskip("openvino")
    model = small()
    path = tmp_path / ("model.xml" if form == "openvino" else "model.onnx")
    vit.export(model, path, form, input=kind, outputs=EVERYTHING, **settings)
    loaded = vit.load_exported(path)
    assert loaded.session.inputs[0].dtype == "uint8"
    size = settings.get("img_size", (28, 20))
    transform, own = vit.create_transform(loaded), vit.create_transform(model, size)
    bar = 2e-3 if settings.get("half") or kind == "image" else 1e-5
    for shape in [(40, 60), (33, 20), (28, 20)]:
        image = picture(shape)
        x = transform(image)[None]
        assert x.dtype == torch.uint8 and x.shape == (1, *(shape if kind == "image" else size), 3)
        with torch.no_grad():
            wanted = model(own(image)[None])
        assert difference(loaded(x), wanted) <= bar
        assert loaded.run(x)["attention"].shape == (1, 2, size[0] // 4, size[1] // 4)
        assert loaded.grid_of(x) == (size[0] // 4, size[1] // 4)


@pytest.mark.slow
def test_one_channel(tmp_path):
    model = small(in_chans=1)
    model.preprocessing = vit.Preprocessing((28, 20), (0.3,), (0.2,))
    vit.export(model, tmp_path / "model.onnx", input="image")
    loaded = vit.load_exported(tmp_path / "model.onnx")
    image = picture((50, 40), "L")
    with torch.no_grad():
        wanted = model(vit.create_transform(model)(image)[None])
    assert difference(loaded(vit.create_transform(loaded)(image)[None]), wanted) <= 2e-3


@pytest.mark.parametrize("kind", [pytest.param("uint8", marks=pytest.mark.slow), "image"])
def test_int8(kind, tmp_path):
    model = vit.load_pretrained("vit_digits_patch4_32")
    images = digit_images()[0]
    transform = vit.create_transform(model)
    calibrate = torch.stack([transform(image) for image in images[:100]])
    report = vit.export(model, tmp_path / "model.onnx", int8=True, calibrate=calibrate, input=kind)
    assert min(row["value"] for row in report.metadata.parity) >= 0.998
    loaded = vit.load_exported(tmp_path / "model.onnx")
    own = vit.create_transform(loaded)
    found = torch.cat([loaded(own(image)[None]) for image in images[100:160]])
    with torch.no_grad():
        wanted = model(torch.stack([transform(image) for image in images[100:160]]))
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() >= 0.95
    assert cosine_similarity(found, wanted).mean() >= 0.998
    assert difference(found, wanted) > 1e-4  # the control: it is not float32


def test_the_gate_refuses_onnx_resize_in_openvino(tmp_path, monkeypatch):
    """Which ignores its antialiasing; in ONNX Runtime nothing shows it."""
    pytest.importorskip("openvino")

    def resized(images, settings, size, p):
        x = interpolate(images.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
        return x.round().clamp(0, 255)

    model = small()
    model.preprocessing = replace(model.preprocessing, mode="squash")
    monkeypatch.setattr(pixels, "resize", resized)
    vit.export(model, tmp_path / "model.onnx", input="image")
    with pytest.raises(ParityError, match="differ from the model's"):
        vit.export(model, tmp_path / "model.xml", input="image")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("pixels"), small()
    model.preprocessing = replace(model.preprocessing, crop_pct=0.9)
    return {kind: vit.export(model, folder / f"{kind}.onnx", input=kind).files[0] for kind in pixels.INPUTS[1:]}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("uint8", {"mean": (0.5, 0.5, 0.5)}), ("uint8", {"std": (0.2, 0.2, 0.2)}), ("image", {"mean": (0.5, 0.5, 0.5)}),
        ("image", {"crop_pct": 0.95}), ("image", {"interpolation": "bilinear"}), ("image", {"mode": "squash"}),
    ],
)  # fmt: skip
def test_the_gate_sees_other_preprocessing(kind, change, files):
    model, loaded = small(), vit.load_exported(files[kind])
    model.preprocessing = loaded.preprocessing
    gate.judge(gate.compare(model, loaded))  # the control
    model.preprocessing = replace(loaded.preprocessing, **change)
    with pytest.raises(ParityError, match="differ from the model's"):
        gate.judge(gate.compare(model, loaded))


@pytest.mark.parametrize("what", ["a pixel beside it", "BGR"])
def test_the_gate_sees_other_pixels(what, files, monkeypatch):
    model, loaded = small(), vit.load_exported(files["image"])
    model.preprocessing = loaded.preprocessing
    if what == "BGR":
        model.patch_embed.proj.weight.data = model.patch_embed.proj.weight.data.flip(1)
    else:
        real = vit.image._crop_start
        monkeypatch.setattr(vit.image, "_crop_start", lambda side, crop: real(side, crop) + 1)
    with pytest.raises(ParityError, match="differ from the model's"):
        gate.judge(gate.compare(model, loaded))


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("uint8", torch.zeros(1, 3, 28, 20), r"\[B, H, W, 3\] pixels in uint8 on the CPU; got torch.float32"),
        ("uint8", torch.zeros(1, 30, 20, 3, dtype=torch.uint8), r"multiples of 4; got \[1, 30, 20, 3\]"),
        ("uint8", torch.zeros(1, 3, 28, 20, dtype=torch.uint8), r"pixels in uint8 on the CPU; got \[1, 3, 28, 20\]"),
        ("image", torch.zeros(28, 20, 3, dtype=torch.uint8), r"got \[28, 20, 3\]"),
        ("image", torch.zeros(1, 0, 20, 3, dtype=torch.uint8), r"got \[1, 0, 20, 3\]"),
        ("image", torch.zeros(1, 1, 20000, 3, dtype=torch.uint8), "1 x 20000 is too long and thin"),
    ],
)
def test_other_images(kind, wrong, message, files):
    loaded = vit.load_exported(files[kind])
    refused_in_one_line(lambda: loaded(wrong), message)


def test_a_picture_that_a_file_refuses_ends_no_run(files, tmp_path):
    """Its transform refuses it, so that commands and servers count it among those that cannot be used."""
    transform = vit.create_transform(vit.load_exported(files["image"]))
    refused_in_one_line(lambda: transform(picture((1, 20000))), "1 x 20000 is too long and thin")
    assert transform(picture((1, 2000))).shape == (1, 2000, 3)


def test_what_the_model_or_the_file_has_settled(files, tmp_path):
    loaded = vit.load_exported(files["image"])
    for asked in ({"size": 32}, {"crop_pct": 0.5}, {"mode": "squash"}, {"mode": "native"}):
        refused_in_one_line(partial(vit.create_transform, loaded, **asked), "this file resizes and crops images itself")
    assert vit.create_transform(loaded, size=(28, 20), crop_pct=0.9, mode="crop").input == "image"
    model = small()
    for settings, kind, message in (
        ({"interpolation": "hamming"}, "image", "resizes by bilinear, bicubic, lanczos, and .* asks for 'hamming'"),
        ({"mean": (0.5,), "std": (0.5,)}, "uint8", "has 1 channels, and the model has 3"),
        ({}, "bytes", "'bytes'"),
    ):
        model.preprocessing = replace(small().preprocessing, **settings)
        refused_in_one_line(partial(vit.export, model, tmp_path / "model.onnx", input=kind), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_no_picture_of_the_gate_is_one_whose_columns_pillow_13_resizes_first(mode, precision):
    for size in [(28, 20), (64, 16), (16, 64), (28, 28)]:
        settings = vit.Preprocessing(size, mode=mode, crop_pct=0.9)
        metadata = SimpleNamespace(size=None, batch=None, input="image", precision=precision)
        exported = SimpleNamespace(metadata=metadata, preprocessing=settings, config=small().config)
        for _, (height, width) in gate.shapes(exported):
            rows, columns = pixels.plan(settings, height, width, size)
            assert rows.old - rows.new <= max(0, 2 * (columns.old - columns.new))
