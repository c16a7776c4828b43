"""From an image file to the tensor that a model was trained on.

An image is read, turned upright, converted to the model's channels, resized with Pillow's antialiased filters, cropped
and normalised. Rounding and order of operations are those of timm's evaluation transform, to which this is equal bit
for bit.
"""

from __future__ import annotations

import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from .checks import nearest_multiple, require_int, unknown, whole_patches

if TYPE_CHECKING:
    from typing import Protocol

    from .config import ViTConfig
    from .metadata import Preprocessing

    class Model(Protocol):
        """A `ViT` or an exported model."""

        config: ViTConfig
        preprocessing: Preprocessing


MODES = ("crop", "squash", "native")

_OPENING = threading.Lock()

# What undoes each value of EXIF's orientation tag; 1 means upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image file that cannot be used; the message is one line with the path and the reason."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file and decode all of it (the first frame, if there are several).

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        The image as stored, in the file's own mode and not yet turned upright; the file is closed.

    Raises:
        ImageError: no such file, a directory, an empty, truncated or broken file, not an image, or an image of more
            than `PIL.Image.MAX_IMAGE_PIXELS` pixels, which is refused before it is decoded.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ImageError(f"expected the path of an image file, not {type(path).__name__}")
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise OSError("a pipe, not a file")
        with _open(path) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{image.width * image.height} pixels")
            image.load()
            return image
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, KeyError ...
        raise ImageError(f"cannot use image {str(path)!r}: {_reason(path, error)}") from error


def _open(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image's header without Pillow's warning about large images: `load_image` has a limit of its own."""
    # Warning filters are shared by the whole process, so only one thread at a time may change them.
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    """Why a file could not be loaded, on one line."""
    if isinstance(error, Image.DecompressionBombError):
        pixels, *_ = re.findall(r"\d+", str(error)) or ["too many"]  # the exception has the number only in its text
        return f"it has {pixels} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS} (PIL.Image.MAX_IMAGE_PIXELS)"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image that Pillow can read" if Path(path).stat().st_size else "the file is empty"
    if (
        isinstance(error, OSError) and error.strerror
    ):  # the system's own reason: no such file, a directory, no permission
        return error.strerror
    return f"it cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Turn an image upright, as its EXIF or XMP orientation says, and convert it to 8 bits and a number of channels.

    Conversion is Pillow's. Alpha is dropped, not blended: the colours under transparent pixels show, as in timm.
    16-bit grey is first scaled by 1/257 and rounded, since Pillow's own conversion would clip it at 255. If Pillow
    cannot read a damaged EXIF block, the image counts as upright.

    Args:
        image: in any mode except the 32-bit modes "I" and "F".
        channels: 3 for "RGB", 1 for "L".

    Returns:
        The converted image, or `image` itself if there is nothing to convert; `image` is never changed.

    Raises:
        ValueError: not a PIL image, an image without pixels, a mode that cannot be converted, or other channels.
    """
    mode = _mode_for(channels)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"expected a PIL image, not {type(image).__name__}: vit.load_image(path) reads a file,"
            " PIL.Image.fromarray(array) takes a uint8 array [H, W, 3]"
        )
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: its height is {image.height} and its width {image.width}")
    image = _upright(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"images of mode {image.mode!r} hold 32-bit numbers of unknown range: scale them to 0..255, as uint8,"
            " and make the image with PIL.Image.fromarray"
        )
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)  # [H, W] in 0..65535, in this machine's byte order
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # to the nearest; no ties: 257 is odd
    if image.mode == mode:
        return image
    if "transparency" in image.info:  # the conversion drops it anyway, for some palettes with a warning
        image = image.copy()
        del image.info["transparency"]
    if image.mode == "LAB":  # Pillow cannot convert it to grey directly
        image = image.convert("RGB")
    return image.convert(mode)


def _mode_for(channels: int) -> str:
    """Pillow's mode for a number of channels; ValueError if there is none."""
    if channels not in (1, 3):
        raise ValueError(
            f"images can be made into 1 or 3 channels, not {channels!r}: make the [{channels}, H, W] tensor yourself,"
            " scaled and normalised as model.preprocessing says"
        )
    return "RGB" if channels == 3 else "L"


def _upright(image: Image.Image) -> Image.Image:
    """Undo the orientation in an image's EXIF or XMP block; the image itself if it is upright.

    Not `ImageOps.exif_transpose`, because that also copies upright images and rewrites the EXIF block, which fails for
    some damaged blocks that can be read.
    """
    image.load()  # some formats know their orientation only now; TIFF applies its own here
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # no TIFF header, among others: Pillow says SyntaxError
        return image
    if method is None:
        return image
    image = image.transpose(method)
    image.info = {}  # so that it is not turned again
    return image


@dataclass(frozen=True)
class Transform:
    """Turns a PIL image into the tensor that a model expects; `create_transform` builds and checks it.

    `transform(image)` takes a PIL image of any size and returns [C, H, W] float32, normalised, on the CPU; for an
    exported file that takes pixels, [H, W, C] uint8 instead. It raises
    ValueError if `to_mode` does; if the image would make more than `max_tokens` patches; if it is so long and thin that
    resizing would make more than `PIL.Image.MAX_IMAGE_PIXELS` pixels; and in "native" if a side is shorter than half a
    patch.
    """

    mode: str  # one of MODES
    size: tuple[int, int] | int | None  # (H, W); in "native" the short side, or None for the image's own size
    patch_size: int  # in pixels; H and W are multiples of it
    mean: tuple[float, ...]  # per channel, for pixels in [0, 1]
    std: tuple[float, ...]
    interpolation: str  # one of vit.metadata.INTERPOLATIONS
    crop_pct: float | None  # in "crop" the image is first resized to cover size / crop_pct; else None
    max_tokens: int | None = None  # the most patches that an image may have
    input: str = "float32"  # "uint8": not normalised; "image": the whole image, which the model itself resizes

    def __call__(self, image: Image.Image) -> Tensor:
        if self.input == "image":
            image = to_mode(image, len(self.mean))
            check_sides((image.height, image.width), self.resized_size(image.height, image.width))
            return as_bytes(image)
        view = self.view(image)
        return self.normalise(view) if self.input == "float32" else as_bytes(view)

    def view(self, image: Image.Image) -> Image.Image:
        """The part of an image that the model sees: upright, resized and cropped to whole patches."""
        image = to_mode(image, len(self.mean))
        height, width = self.resized_size(image.height, image.width)
        if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(
                f"an image of {image.height} x {image.width} would be resized to {height} x {width}, more pixels than"
                f" the limit of {Image.MAX_IMAGE_PIXELS} (PIL.Image.MAX_IMAGE_PIXELS)"
            )
        self.check_tokens(image, height, width)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        if self.mode == "crop":
            assert isinstance(self.size, tuple)
            image = _center_crop(image, self.size)
        return image

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) to which an upright image is resized, before any crop."""
        if self.mode == "native":
            assert not isinstance(self.size, tuple)
            p, short = self.patch_size, min(height, width)
            target = short if self.size is None else nearest_multiple(self.size, p)  # for the short side
            if 2 * target < p:
                raise ValueError(
                    f"an image of {height} x {width} has a side of less than half a patch of {p} x {p}: give a size,"
                    " to which the short side is then resized"
                )
            return nearest_multiple(height * target / short, p), nearest_multiple(width * target / short, p)
        assert isinstance(self.size, tuple)
        if self.mode == "squash":
            return self.size
        assert self.crop_pct is not None
        cover = to_cover(self.size, self.crop_pct)
        if cover[0] == cover[1]:  # torchvision's rounding: the long side is cut down to a whole number
            long = int(cover[0] * max(height, width) / min(height, width))
            return (long, cover[0]) if height > width else (cover[0], long)
        ratio = min(height / cover[0], width / cover[1])  # timm's rounding: both sides to the nearest
        return round(height / ratio), round(width / ratio)

    def check_tokens(self, image: Image.Image, height: int, width: int) -> None:
        """Raise ValueError if an image, resized to (height, width) and then cropped, makes too many patches."""
        if self.mode == "crop":
            assert isinstance(self.size, tuple)
            height, width = self.size
        tokens = (height // self.patch_size) * (width // self.patch_size)
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(
                f"an image of {image.height} x {image.width} makes {tokens} patches at {height} x {width}, more than"
                f" max_tokens={self.max_tokens}: ask for a smaller size"
            )

    def normalise(self, image: Image.Image) -> Tensor:
        """An image of mode "L" or "RGB" -> [C, H, W] float32: (pixel / 255 - mean) / std, in this order.

        In NumPy: for so few numbers PyTorch's threads cost more than they save, ten times as much on busy cores.
        """
        pixels = np.asarray(image).reshape(image.height, image.width, -1)  # [H, W, C] uint8
        mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.mean, self.std))  # [C, 1, 1]
        out = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)  # [C, H, W]
        out /= np.float32(255)
        out -= mean
        out /= std
        return torch.from_numpy(out)


def to_cover(size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """The (height, width) that an image is resized to cover before `size` is cut out of its middle, as in timm."""
    height, width = (math.floor(side / crop_pct) for side in size)
    return height, width


def check_sides(old: Iterable[int], new: Iterable[int]) -> None:
    """ValueError for a picture so long and thin that a graph's whole numbers, of 32 bits in OpenVINO, would not do.

    `old` are (height, width) as it comes, and `new` those to which the graph resizes it.
    """
    height, width = old
    if any((2 * after + 1) * before >= 2**31 for before, after in zip((height, width), new)):
        raise ValueError(f"a picture of {height} x {width} is too long and thin to be resized in a graph: cut it")


def as_bytes(image: Image.Image) -> Tensor:
    """An image of mode "L" or "RGB" -> [H, W, C] uint8."""
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1))


def _center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cut (H, W) out of an image's middle; a smaller image is surrounded by black."""
    (H, W), (width, height) = size, image.size
    top, left = _crop_start(height, H), _crop_start(width, W)
    return image.crop((left, top, left + W, top + H))  # Pillow fills the outside with zeros


def _crop_start(side: int, crop: int) -> int:
    """Where a crop starts along one side; negative if it is longer. Odd remainders are split as in torchvision."""
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def create_transform(
    model: Model,
    size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    mode: str | None = None,
    max_tokens: int | None = None,
) -> Transform:
    """The transform from a PIL image to the [C, H, W] tensor that `model` expects.

    The modes:
        "crop": resize the image to cover size / crop_pct and cut size out of its middle. Equals timm's evaluation
            transform, bit for bit, on the upright image in the model's channels.
        "squash": resize to size, ignoring the image's proportions, and cut nothing off: Google's own evaluation, with
            Pillow's antialiased filter.
        "native": keep the proportions and the whole image, each side rounded to the nearest multiple of the patch
            (exact halves are rounded up).

    Args:
        model: its `preprocessing` has size, mean, std, interpolation and crop_pct; its `config` the channels and patch.
        size: (H, W) or one number for a square, multiples of the patch; None for the model's own. In "native" one
            number: the short side is resized to the nearest multiple of the patch; None keeps the image's own size.
        crop_pct: in (0, 1], "crop" only; None for the model's own.
        mode: one of MODES; None for the model's own, "crop" for most.
        max_tokens: images that would make more patches are refused, since the cost of attention grows with the square
            of the number of patches. None for no limit.

    Raises:
        ValueError: an unknown mode, a size or crop_pct that the mode cannot use, or a model whose channels are not 1
            or 3.
    """
    config, settings = model.config, model.preprocessing
    mode = settings.mode if mode is None else mode
    if mode not in MODES:
        raise ValueError(unknown("mode", mode, MODES))
    _mode_for(config.in_chans)
    if len(settings.mean) != config.in_chans:
        raise ValueError(f"model.preprocessing has {len(settings.mean)} channels, but the model has {config.in_chans}")
    input = getattr(model, "input", "float32")  # of an exported model
    if input == "image":
        _check_own(settings, size=(size, size) if isinstance(size, int) else size, crop_pct=crop_pct, mode=mode)
    if max_tokens is not None:
        require_int("max_tokens", max_tokens, 1)
    if crop_pct is not None:
        if mode != "crop":
            raise ValueError(f"crop_pct={crop_pct!r} has no use in mode {mode!r}, which cuts nothing off")
        settings = replace(settings, crop_pct=crop_pct)  # which checks it
    if mode == "native":
        _check_short_side(size)
    else:
        size = whole_patches(settings.size if size is None else size, config.patch_size)
    return Transform(
        mode=mode,
        size=size,
        patch_size=config.patch_size,
        mean=settings.mean,
        std=settings.std,
        interpolation=settings.interpolation,
        crop_pct=settings.crop_pct if mode == "crop" else None,
        max_tokens=max_tokens,
        input=input,
    )


def _check_own(settings: Preprocessing, **asked: object) -> None:
    """ValueError if something else is asked of a file that prepares images itself."""
    for name, value in asked.items():
        own = getattr(settings, name)
        if value not in (None, own):
            raise ValueError(
                f"this file resizes and crops images itself, with {name}={own!r}: {value!r} cannot go with it"
            )


def _check_short_side(size: object) -> None:
    """Mode "native" takes None or one whole number above 0; ValueError for any other size."""
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(
            f"mode 'native' keeps the image's proportions: size must be one whole number above 0, for the short side,"
            f" or None, not {size!r}"
        )
