"""Images for the commands: find the files, decode them in threads, group them into batches."""

from __future__ import annotations

import glob
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vit.image import ImageError, Transform, load_image
from vit.model import ViT
from vit.packed import BUDGET
from vit.training.distributed import rank_and_world

from .loading import Model

# The endings that count as images when a folder is searched. A file named by the user is read whatever its ending.
ENDINGS = {
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2", ".avif",
}  # fmt: skip

Decoded = tuple[Path, Tensor | ImageError]  # a file, and its pixels [C, H, W] or why it cannot be used


def find_images(arguments: Iterable[str]) -> list[Path]:
    """The files that the arguments name, in their order: files as given; folders and globs expanded and sorted.

    Raises:
        ValueError: an empty name, a folder without images, or a glob without a match.
    """
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if not argument:  # as from an unset shell variable; Path("") would be the current folder
            raise ValueError("expected the name of an image, a folder or a glob, got ''")
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
            if not found:
                raise ValueError(f"the folder {argument} holds no images")
        elif not path.exists() and glob.has_magic(argument):
            found = sorted(Path(match) for match in glob.glob(argument, recursive=True) if os.path.isfile(match))
            if not found:
                raise ValueError(f"no file matches {argument}")
        else:
            found = [path]
        paths += found
    return paths


def decode(paths: Iterable[Path], transform: Callable[[Image.Image], Tensor]) -> Iterator[Decoded]:
    """Read and transform images in the order of `paths`, in threads that stay a few images ahead of the model."""

    def prepare(path: Path) -> Decoded:
        try:
            return path, transform(load_image(path))
        except ImageError as error:
            return path, error
        except ValueError as error:  # a readable image that the transform refuses
            return path, ImageError(f"{path}: {error}")

    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque = deque()
        try:
            for path in paths:
                ahead.append(pool.submit(prepare, path))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def batches(items: Iterable[Decoded], size: int, transform: Transform) -> Iterator[list[Decoded]]:
    """Consecutive items in groups of `size`, files that cannot be used included.

    Images at their own sizes ("native") come in smaller groups, of at most `vit.packed.BUDGET` patches; those that an
    exported file resizes itself, one by one.
    """
    batch: list[Decoded] = []
    tokens = 0
    for item in items:
        if transform.mode == "native" and isinstance(item[1], Tensor):
            more = item[1].numel() // (len(transform.mean) * transform.patch_size**2)
            if batch and tokens + more > BUDGET:
                yield batch
                batch, tokens = [], 0
            tokens += more
        batch.append(item)
        if len(batch) == size or transform.input == "image":
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def usable(batch: Iterable[Decoded], model: Model) -> list[Tensor]:
    """The images of a batch that could be read, each [C, H, W] on the model's device and in its dtype."""
    place = model.patch_embed.proj.weight if isinstance(model, ViT) else model
    return [outcome.to(place.device, place.dtype) for _, outcome in batch if isinstance(outcome, Tensor)]


def counted(number: int, noun: str) -> str:
    """(1, "image") -> "1 image", (2, "image") -> "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@contextmanager
def progress(total: int) -> Iterator[tqdm]:
    """A bar that counts images, shown by the first process where stderr is a terminal.

    Pillow's warnings are silenced meanwhile. A file that it cannot read is reported as an error; one that it warns
    about was read.
    """
    shown = total > 1 and sys.stderr is not None and sys.stderr.isatty() and rank_and_world()[0] == 0
    with warnings.catch_warnings(), tqdm(total=total, unit="image", leave=False, disable=not shown) as bar:
        warnings.filterwarnings("ignore", module="PIL")
        yield bar
