"""Image files and preprocessing: bit for bit timm's on real photographs, and every refusal."""

import io
import math
import pickle
import random
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm.data
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import CenterCrop
from torchvision.transforms.functional import _compute_resized_output_size

from vit.image import ImageError, Transform, create_transform, load_image, nearest_multiple, to_mode
from vit.metadata import INTERPOLATIONS
from vit.model import ViT
from vit.presets import create_model

SMALL = create_model("vit_small_patch16_224", depth=1)
LARGE = create_model("vit_small_patch16_384", depth=1)
DINOV2 = create_model("vit_small_patch14_dinov2", depth=1)  # patch 14, and a mean and std per channel
GREY = create_model("vit_small_patch16_224", depth=1, in_chans=1)

CHINA, FLOWER = (Image.fromarray(array) for array in load_sample_images().images)  # 640 x 427, width first
PHOTOS = {
    "china": CHINA,
    "flower": FLOWER,
    "astronaut": Image.fromarray(skimage.data.astronaut()),  # 512 x 512
    "chelsea": Image.fromarray(skimage.data.chelsea()),  # 451 x 300
    "coffee": Image.fromarray(skimage.data.coffee()),  # 600 x 400
    "rocket": Image.fromarray(skimage.data.rocket()),  # 640 x 427
    "portrait": CHINA.transpose(Image.Transpose.ROTATE_90),  # 427 x 640
    "odd": CHINA.crop((3, 5, 340, 218)),  # 337 x 213
    "strip": CHINA.crop((0, 100, 640, 137)),  # 640 x 37
    "column": CHINA.crop((300, 0, 331, 427)),  # 31 x 427
    "tiny": CHINA.crop((300, 200, 307, 205)),  # 7 x 5
    "pixel": CHINA.crop((300, 200, 301, 201)),
    "exact": CHINA.crop((100, 100, 348, 348)),  # 248 x 248: SMALL resizes nothing
}
CAT = PHOTOS["chelsea"]


@pytest.fixture(autouse=True)
def one_thread():
    """On busy cores, timm's normalisation takes ten times as long in two threads as in one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timm_transform(model, size=None, crop_pct=None, interpolation=None):
    settings = model.preprocessing
    height, width = settings.size if size is None else (size, size) if isinstance(size, int) else size
    return timm.data.create_transform(
        input_size=(model.config.in_chans, height, width),
        is_training=False,
        interpolation=interpolation or settings.interpolation,
        mean=settings.mean,
        std=settings.std,
        crop_pct=crop_pct or settings.crop_pct,
    )


def grey16(image):
    """A photograph as 16-bit grey, [H, W] uint16 in 0..65535, with low bytes that matter."""
    array = np.asarray(image.convert("RGB")).astype(np.uint32)
    return (array[..., 0] * 200 + array[..., 1] * 50 + array[..., 2] * 7).astype(np.uint16)


def orientation_block(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_orientation(image, orientation, format="PNG"):
    """`image` after a round trip through a file of some format, with an EXIF orientation."""
    file = io.BytesIO()
    image.save(file, format, exif=orientation_block(orientation))
    return Image.open(io.BytesIO(file.getvalue()))


def palette_image(transparency=None):
    image = CAT.convert("P", palette=Image.Palette.ADAPTIVE)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


# Equal to timm


@pytest.mark.parametrize("size", [None, 224, 384, (256, 160), (112, 448), 16])
@pytest.mark.parametrize("name", PHOTOS)
def test_crop_equals_timm(name, size):
    image = PHOTOS[name]
    for crop_pct in (None, 0.875, 1.0):
        ours = create_transform(SMALL, size=size, crop_pct=crop_pct)(image)
        assert torch.equal(ours, timm_transform(SMALL, size, crop_pct)(image)), crop_pct
    assert ours.dtype == torch.float32 and ours.is_contiguous()


def test_the_models_own_mode_is_the_default():
    model = create_model("vit_small_patch16_224", depth=1)
    model.preprocessing = replace(model.preprocessing, mode="squash")
    assert torch.equal(create_transform(model)(CHINA), create_transform(model, mode="squash")(CHINA))
    assert not torch.equal(create_transform(model, mode="crop")(CHINA), create_transform(model)(CHINA))
    with pytest.raises(ValueError, match="unknown mode 'border'"):
        replace(model.preprocessing, mode="border")


@pytest.mark.parametrize("model", [LARGE, DINOV2], ids=["384", "dinov2"])
@pytest.mark.parametrize("name", ["china", "portrait", "odd"])
def test_other_models_equal_timm(model, name):
    assert torch.equal(create_transform(model)(PHOTOS[name]), timm_transform(model)(PHOTOS[name]))


def test_a_size_above_the_photograph_equals_timm():
    for size in (1024, (512, 1024)):
        assert torch.equal(create_transform(SMALL, size)(CAT), timm_transform(SMALL, size)(CAT))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_equals_timm(interpolation):
    model = create_model("vit_small_patch16_224", depth=1)
    model.preprocessing = replace(model.preprocessing, interpolation=interpolation)
    for size in (224, (256, 160)):
        ours = create_transform(model, size)(CHINA)
        assert torch.equal(ours, timm_transform(model, size)(CHINA))
        others = [timm_transform(model, size, interpolation=name)(CHINA) for name in INTERPOLATIONS]
        assert sum(torch.equal(ours, other) for other in others) == 1  # the control: no other filter passes


def test_geometry_equals_torchvision_and_timm():
    rng = random.Random(0)
    for _ in range(3000):
        h, w = rng.randint(1, 900), rng.randint(1, 900)
        size = (16 * rng.randint(1, 40), 16 * rng.randint(1, 40))
        crop_pct = rng.choice([0.875, 0.9, 0.95, 1.0, rng.uniform(0.3, 1.0)])
        transform = create_transform(SMALL, size, crop_pct)
        cover = tuple(math.floor(side / crop_pct) for side in size)
        if cover[0] == cover[1]:
            expected = _compute_resized_output_size((h, w), [cover[0]])
        else:
            expected = ResizeKeepRatio.get_params(Image.new("1", (w, h)), cover, 0.0)
        assert transform.resized_size(h, w) == tuple(expected), (h, w, size, crop_pct)


@pytest.mark.parametrize("size", [(224, 224), (256, 160), (112, 448), (16, 48)])
def test_padding_equals_timm(size):
    # A crop_pct above 1 leaves black around the image. Preprocessing refuses it, so no model has it.
    for crop_pct in (1.13, 1.5):
        for image in (CHINA, PHOTOS["portrait"], PHOTOS["odd"], PHOTOS["tiny"]):
            transform = replace(create_transform(DINOV2, 224), size=size, crop_pct=crop_pct)
            assert torch.equal(transform(image), timm_transform(DINOV2, size, crop_pct)(image))


def test_crops_and_pads_as_torchvision_does():
    from vit.image import _center_crop

    for height in (5, 6, 9, 12):
        image = CHINA.crop((200, 200, 209, 200 + height))  # 9 wide
        for size in ((4, 4), (5, 9), (7, 8), (9, 7), (10, 3), (3, 12), (13, 14)):
            assert np.array_equal(_center_crop(image, size), CenterCrop(size)(image)), (height, size)


def test_a_wrong_filter_a_wrong_crop_and_a_wrong_mean_are_noticed():
    ours = create_transform(SMALL)(CHINA)
    assert not torch.equal(ours, timm_transform(SMALL, interpolation="bilinear")(CHINA))
    assert not torch.equal(ours, timm_transform(SMALL, crop_pct=0.905)(CHINA))  # 247 for 248
    assert not torch.equal(create_transform(DINOV2, 224, 0.9)(CHINA), ours)


# Modes of images


MODE_IMAGES = {
    "L": CAT.convert("L"),
    "L with transparency": CAT.convert("L"),
    "LA": CAT.convert("LA"),
    "P": palette_image(),
    "P, one transparent": palette_image(3),
    "P, alphas": palette_image(bytes(range(256))),
    "RGBA": CAT.convert("RGBA"),
    "RGB with transparency": CAT.copy(),
    "CMYK": CAT.convert("CMYK"),
    "1": CAT.convert("1"),
    "YCbCr": CAT.convert("YCbCr"),
    "HSV": CAT.convert("HSV"),
    "LAB": CAT.convert("LAB"),
    "PA": palette_image().convert("PA"),
    "RGBX": CAT.convert("RGBX"),
}
MODE_IMAGES["L with transparency"].info["transparency"] = 7
MODE_IMAGES["RGB with transparency"].info["transparency"] = (1, 2, 3)
for name in ("LA", "RGBA", "PA"):
    MODE_IMAGES[name].putalpha(PHOTOS["coffee"].convert("L").resize(CAT.size))


@pytest.mark.parametrize("name", MODE_IMAGES)
def test_odd_modes_equal_timm(name):
    image = MODE_IMAGES[name]
    before, info = image.tobytes(), dict(image.info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on palettes with alphas
        rgb = ImageOps.exif_transpose(image).convert("RGB")
        grey = rgb.convert("L") if image.mode == "LAB" else image.convert("L")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(create_transform(SMALL)(image), timm_transform(SMALL)(rgb))
        assert torch.equal(create_transform(GREY)(image), timm_transform(GREY)(grey))
    assert image.tobytes() == before and image.info == info


def test_16_bit_grey_is_scaled_not_clipped():
    array = grey16(CAT)
    eight = Image.fromarray(np.rint(array / 257).astype(np.uint8))
    assert eight.getextrema()[1] > 200  # a photograph, not noise in the dark
    for mode, dtype in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")):
        image = Image.frombytes(mode, CAT.size, array.astype(dtype).tobytes())
        ours = create_transform(SMALL)(image)
        assert torch.equal(ours, timm_transform(SMALL)(eight.convert("RGB")))
        assert torch.equal(create_transform(GREY)(image), timm_transform(GREY)(eight))
        assert not torch.equal(ours, timm_transform(SMALL)(image.convert("RGB")))  # the control: Pillow's clipping


def test_16_bit_rounding_is_to_the_nearest():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(to_mode(Image.fromarray(every), 1), np.rint(every / 257).astype(np.uint8))


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
def test_to_mode_gives_the_mode_and_copies_nothing_without_need(channels, mode):
    image = to_mode(CAT, channels)
    assert image.mode == mode
    assert to_mode(image, channels) is image


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientations(format, orientation):
    image = with_orientation(CAT, orientation, format)
    upright = ImageOps.exif_transpose(image).convert("RGB")
    assert upright.size == (CAT.size if orientation < 5 else CAT.size[::-1])
    assert torch.equal(create_transform(SMALL, (112, 448))(image), timm_transform(SMALL, (112, 448))(upright))
    turned = to_mode(image, 3)
    assert np.array_equal(to_mode(turned, 3), turned)  # turned once, not again


def test_orientations_differ():
    results = [create_transform(SMALL)(with_orientation(CAT, orientation)) for orientation in range(1, 9)]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_grey_and_palettes_are_turned_too(orientation):
    array = grey16(CAT)
    for format in ("PNG", "TIFF"):
        image = with_orientation(Image.fromarray(array), orientation, format)
        assert image.mode == "I;16"
        eight = Image.fromarray(np.rint(array / 257).astype(np.uint8))
        expected = ImageOps.exif_transpose(with_orientation(eight, orientation))
        assert np.array_equal(to_mode(image, 1), expected)
    image = with_orientation(palette_image(), orientation)
    assert np.array_equal(to_mode(image, 3), ImageOps.exif_transpose(image).convert("RGB"))


def test_orientations_that_do_not_exist_are_upright():
    for orientation in (0, 9, 77):
        assert np.array_equal(to_mode(with_orientation(CAT, orientation), 3), CAT)


def test_damaged_exif_blocks():
    file = io.BytesIO()
    CAT.save(file, "PNG", exif=b"Exif\0\0garbage!")
    image = Image.open(io.BytesIO(file.getvalue()))
    with pytest.raises(SyntaxError):
        ImageOps.exif_transpose(image)
    assert np.array_equal(to_mode(Image.open(io.BytesIO(file.getvalue())), 3), CAT)

    # Readable, but it cannot be written back: the maker's name has the type rational.
    exif = b"Exif\0\0" + b"II*\0\x08\0\0\0" + struct.pack("<H", 2)
    exif += struct.pack("<HHII", 0x010F, 5, 1, 38) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<I", 0)
    file = io.BytesIO()
    CAT.save(file, "PNG", exif=exif + struct.pack("<II", 1, 3))
    with pytest.raises(Exception, match="encode"):
        ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    turned = to_mode(Image.open(io.BytesIO(file.getvalue())), 3)
    assert np.array_equal(turned, CAT.transpose(Image.Transpose.ROTATE_270))


# The other modes of the transform


@pytest.mark.parametrize("size, expected", [(None, (224, 224)), (96, (96, 96)), ((112, 448), (112, 448))])
@pytest.mark.parametrize("name", ["china", "portrait", "tiny"])
def test_squash_is_a_plain_resize(name, size, expected):
    image = PHOTOS[name]
    pixels = np.asarray(image.resize(expected[::-1], Image.Resampling.BICUBIC)).astype(np.float32)
    ours = create_transform(SMALL, size, mode="squash")(image)
    assert ours.shape == (3, *expected)
    expected = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert np.array_equal(ours, expected.transpose(2, 0, 1))
    # Google's scaling of the same pixels, up to rounding
    np.testing.assert_allclose(ours, ((pixels - 127.5) / 127.5).transpose(2, 0, 1), atol=2e-7)


@pytest.mark.parametrize(
    "model, size, height, width, expected",
    [
        (SMALL, None, 427, 640, (432, 640)),
        (SMALL, None, 640, 427, (640, 432)),
        (SMALL, None, 24, 23, (32, 16)),  # halves go up
        (SMALL, None, 8, 9, (16, 16)),
        (SMALL, 224, 427, 640, (224, 336)),
        (SMALL, 224, 640, 427, (336, 224)),
        (SMALL, 230, 427, 640, (224, 336)),  # in proportion to the rounded short side
        (SMALL, 232, 500, 500, (240, 240)),
        (SMALL, 1, 100, 1000, (16, 160)),
        (DINOV2, None, 427, 640, (434, 644)),
        (DINOV2, 518, 300, 451, (518, 784)),
    ],
)
def test_native_sizes(model, size, height, width, expected):
    transform = create_transform(model, size, mode="native")
    assert transform.resized_size(height, width) == expected
    image = CHINA.resize((width, height))
    ours = transform(image)
    assert ours.shape == (3, *expected)
    settings = replace(model.preprocessing, size=expected)
    resized = image.resize(expected[::-1], Image.Resampling.BICUBIC)
    same = Transform("native", None, model.config.patch_size, settings.mean, settings.std, "nearest", None)
    assert torch.equal(ours, same(resized))


def test_native_refuses_sides_that_would_vanish():
    transform = create_transform(SMALL, mode="native")
    for size in ((1, 10_000), (10_000, 7), (1, 1)):
        with pytest.raises(ValueError, match="side of less than half a patch of 16 x 16"):
            transform(CHINA.resize(size))
    assert create_transform(SMALL, 32, mode="native")(CHINA.resize((7, 7))).shape == (3, 32, 32)


def test_too_many_tokens_are_refused():
    """Those of the transformed image count: 14 x 14 in "crop", whatever the photograph."""
    assert create_transform(SMALL, mode="crop", max_tokens=196)(CHINA).shape == (3, 224, 224)
    for mode, size, patches in (
        ("crop", None, 196),
        ("squash", (32, 64), 8),
        ("native", 32, 6),
        ("native", None, 1080),
    ):
        assert create_transform(SMALL, size, mode=mode, max_tokens=patches)(CHINA).shape[0] == 3
        with pytest.raises(ValueError, match=f"makes {patches} patches at .* more than max_tokens={patches - 1}"):
            create_transform(SMALL, size, mode=mode, max_tokens=patches - 1)(CHINA)


def test_native_leaves_whole_patches_alone():
    image = CHINA.crop((0, 0, 320, 208))
    ours = create_transform(SMALL, mode="native")(image)
    assert np.array_equal(ours.mul(127.5).add(127.5).round().to(torch.uint8).permute(1, 2, 0), image)


def test_the_model_takes_what_every_mode_makes():
    for mode in ("crop", "squash", "native"):
        images = create_transform(SMALL, size=64, mode=mode)(CHINA)[None]
        assert SMALL.eval()(images).shape == (1, 1000)


def test_nearest_multiple():
    for patch in (14, 16, 5):
        for side in range(1, 100):
            ours = nearest_multiple(side, patch)
            best = min(range(patch, 200, patch), key=lambda m: (abs(m - side), -m))
            assert ours == best


def test_one_channel():
    images = create_transform(GREY)(CHINA)
    assert images.shape == (1, 224, 224)
    assert torch.equal(images, timm_transform(GREY)(CHINA.convert("L")))


def test_transforms_pickle_compare_and_show_what_they_do():
    transform = create_transform(SMALL, (256, 160))
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform and hash(again) == hash(transform)
    assert torch.equal(again(CHINA), transform(CHINA))
    assert repr(transform) == (
        "Transform(mode='crop', size=(256, 160), patch_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), "
        "interpolation='bicubic', crop_pct=0.9, max_tokens=None, input='float32')"
    )
    assert create_transform(SMALL, mode="native").crop_pct is None


def test_the_callers_defaults_change_nothing():
    expected = create_transform(SMALL)(CHINA)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(create_transform(SMALL)(CHINA), expected)
        with torch.device("meta"):
            assert torch.equal(create_transform(SMALL)(CHINA), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# Files


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_load_image_equals_pillow(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    CAT.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an unclosed file would warn
        image = load_image(path)
        with Image.open(path) as expected:
            assert np.array_equal(image, expected)
        path.unlink()
        assert torch.equal(create_transform(SMALL)(image), timm_transform(SMALL)(image.convert("RGB")))


def test_load_image_reads_a_photograph():
    assert np.array_equal(load_image(shipped("astronaut.png")), PHOTOS["astronaut"])


def shipped(name):
    return str(Path(skimage.data.__file__).parent / name)


@pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG", "WEBP"])
def test_files_of_many_frames_give_the_first(tmp_path, format):
    path = tmp_path / "film"
    CAT.save(path, format, save_all=True, append_images=[CHINA.resize(CAT.size)], exif=orientation_block(6))
    image = load_image(path)
    assert image.fp is None or image.fp.closed
    with Image.open(path) as film:
        assert film.n_frames == 2
        first = ImageOps.exif_transpose(film).convert("RGB")
    assert first.size == (CAT.size if format == "GIF" else CAT.size[::-1])  # a GIF has no EXIF
    assert np.array_equal(to_mode(image, 3), first)
    assert load_image(shipped("multipage.tif")).size == (10, 15)


def assert_refused(path, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=reason) as info:
            load_image(path)
    assert repr(str(path)) in str(info.value) and "\n" not in str(info.value)


def test_files_that_are_not_images_are_refused(tmp_path):
    assert_refused(tmp_path / "none.jpg", "No such file")
    assert_refused(str(tmp_path / "none.jpg"), "No such file")
    assert_refused(tmp_path, "Is a directory")
    assert_refused("nul\0byte.jpg", "null byte")
    (tmp_path / "empty.jpg").touch()
    assert_refused(tmp_path / "empty.jpg", "the file is empty")
    (tmp_path / "text\nfile.jpg").write_text("<html>not found</html>")
    assert_refused(tmp_path / "text\nfile.jpg", "not an image that Pillow can read")
    for value in (None, 3, CAT, b"photo.jpg"):
        with pytest.raises(ImageError, match=f"path of an image file, not {type(value).__name__}"):
            load_image(value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "ICO", "TGA"])
def test_truncated_files_are_refused(tmp_path, format):
    file = io.BytesIO()
    CAT.resize((90, 60)).save(file, format)
    data = file.getvalue()
    path = tmp_path / "photo"
    for length in [len(data) * i // 12 for i in range(1, 11)]:
        path.write_bytes(data[:length])
        assert_refused(path, "decoded|not an image")


def test_broken_files_are_refused_or_decoded(tmp_path, capfd):
    """Random damage: an image or an ImageError, never another exception."""
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "photo", 0
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "JPEG2000"):
        file = io.BytesIO()
        with_orientation(CAT.resize((45, 30)), 6).save(file, format)
        for _ in range(60):
            data = bytearray(file.getvalue())
            for _ in range(4):
                data[rng.integers(min(len(data), 300))] = rng.integers(256)
            path.write_bytes(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on tags that it skips
                try:
                    image = load_image(path)
                except ImageError as error:
                    assert str(path) in str(error)
                    image = None
            if image is None:
                refused += 1
            else:
                to_mode(image, 3)
    assert refused > 100
    assert capfd.readouterr() == ("", "")


def png_of(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow warns about the first and refuses the second
def test_bombs_are_refused_before_decoding(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(side, side))
    assert_refused(path, f"it has {side * side} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS} ")


def test_the_limit_is_pillows(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    CAT.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", CAT.width * CAT.height)
    assert load_image(path).size == CAT.size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", CAT.width * CAT.height - 1)
    assert_refused(path, "more than the limit of 135299 ")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert create_transform(SMALL)(load_image(path)).shape == (3, 224, 224)


# Refusals


@pytest.mark.parametrize(
    "image, message",
    [
        ("photo.jpg", r"expected a PIL image, not str: vit.load_image\(path\) reads a file"),
        (Path("photo.jpg"), r"expected a PIL image, not \w*Path: vit.load_image"),
        (np.zeros((4, 4, 3), np.uint8), r"not ndarray: .*PIL.Image.fromarray\(array\)"),
        (torch.zeros(3, 4, 4), "expected a PIL image, not Tensor"),
        (None, "expected a PIL image, not NoneType"),
        (Image.new("RGB", (0, 5)), "no pixels: its height is 5 and its width 0"),
        (Image.new("L", (5, 0)), "no pixels: its height is 0 and its width 5"),
        (Image.new("I", (4, 4)), "mode 'I' hold 32-bit numbers of unknown range"),
        (Image.new("F", (4, 4)), "mode 'F' hold 32-bit numbers of unknown range"),
        (Image.new("La", (4, 4)), "conversion from La to L not supported"),
        (Image.new("L", (1, 1_000_000)), "1000000 x 1 would be resized to 248000000 x 248, more pixels than the limit"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],  # parallel workers must agree on the names
)
def test_images_that_cannot_be_used(image, message):
    with pytest.raises(ValueError, match=message):
        create_transform(SMALL)(image)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "squish"}, "unknown mode 'squish'. Did you mean 'squash'.*crop, squash, native"),
        ({"mode": 3}, "unknown mode 3"),
        ({"size": 230}, "size 230 x 230 is not made of whole patches of 16 x 16 pixels; .* works is 224 x 224"),
        ({"size": (7, 248), "mode": "squash"}, "size 7 x 248 is .*the nearest size that works is 16 x 256"),
        ({"size": 0}, "size must be a whole number above 0"),
        ({"size": (224, 224, 3)}, "size must be a whole number above 0"),
        ({"size": 224.0}, "size must be a whole number above 0"),
        ({"size": "224"}, "size must be a whole number above 0"),
        ({"size": True}, "size must be a whole number above 0"),
        ({"crop_pct": 0.0}, r"crop_pct must lie in \(0, 1\], not 0.0"),
        ({"crop_pct": 1.1}, r"crop_pct must lie in \(0, 1\], not 1.1"),
        ({"crop_pct": "0.9"}, "crop_pct must be a finite number, not '0.9'"),
        ({"crop_pct": 0.9, "mode": "squash"}, "crop_pct=0.9 has no use in mode 'squash'"),
        ({"crop_pct": 0.9, "mode": "native"}, "crop_pct=0.9 has no use in mode 'native'"),
        ({"size": (224, 320), "mode": "native"}, r"mode 'native' keeps .* one whole number .* not \(224, 320\)"),
        ({"size": 0, "mode": "native"}, "one whole number above 0.*not 0"),
        ({"size": True, "mode": "native"}, "one whole number above 0.*not True"),
        ({"size": 2.5, "mode": "native"}, "one whole number above 0.*not 2.5"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_transform(SMALL, **arguments)


def test_models_that_no_image_fits():
    four = create_model("vit_small_patch16_224", depth=1, in_chans=4)
    with pytest.raises(ValueError, match=r"1 or 3 channels, not 4: make the \[4, H, W\] tensor yourself"):
        create_transform(four)
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        to_mode(CAT, 2)
    without_statistics = ViT(GREY.config)
    without_statistics.preprocessing = create_model("vit_small_patch16_224", depth=1).preprocessing
    with pytest.raises(ValueError, match=r"model\.preprocessing has 3 channels, but the model has 1"):
        create_transform(without_statistics)
    ragged = create_model("vit_small_patch16_224", depth=1)
    ragged.preprocessing = replace(ragged.preprocessing, size=(230, 224))
    with pytest.raises(ValueError, match=r"size 230 x 224 .* works is 224 x 224"):
        create_transform(ragged)
