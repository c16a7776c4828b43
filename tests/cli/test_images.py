"""Images for the commands: order, batches and how far decoding runs ahead."""

import time
from pathlib import Path

import pytest
import torch

import vit
from vit.cli.images import batches, counted, decode, find_images
from vit.image import ImageError, create_transform

DIGITS = "vit_digits_patch4_32"


def test_files_keep_their_order_and_folders_are_searched(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "below/deep/c.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()  # not a file
    text, glob, gone = (str(tmp_path / name) for name in ("notes.txt", "**/*.png", "gone.png"))
    found = [tmp_path / name for name in ("a.JPG", "b.png", "below/deep/c.tiff")]
    assert find_images([text, str(tmp_path), gone]) == [Path(text), *found, Path(gone)]  # a named file is not checked
    assert find_images([glob, glob]) == [tmp_path / "b.png"] * 2
    (tmp_path / "[1].png").touch()  # a file whose name looks like a glob
    assert find_images([str(tmp_path / "[1].png")]) == [tmp_path / "[1].png"]
    for argument, message in (("", "got ''"), (str(tmp_path / "folder.png"), "holds no images"), ("*.x", "no file")):
        with pytest.raises(ValueError, match=message):
            find_images([argument])


def test_batches_keep_order():
    model = vit.load_pretrained(DIGITS)
    crop, native = create_transform(model), create_transform(model, mode="native")
    items = [(Path(str(i)), ImageError("x") if i % 3 else torch.zeros(3, 8, 8)) for i in range(7)]
    groups = [[int(str(path)) for path, _ in batch] for batch in batches(items, 3, crop)]
    assert groups == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches([], 3, crop)) == []
    large = [(Path(str(i)), torch.zeros(3, 128, side)) for i, side in enumerate((128, 64, 64, 128, 64, 128))]
    groups = [[int(str(path)) for path, _ in batch] for batch in batches(large, 4, native)]  # 1024 tokens, or 512
    assert groups == [[0, 1, 2], [3, 4], [5]]  # 2048 at a time
    assert len(list(batches(large, 4, crop))) == 2


def test_decoding_stays_a_bounded_way_ahead(digit_files):
    """Of thousands of files, only a bounded number is decoded ahead."""
    decoded = []
    path = next(digit_files.glob("*.png"))
    transform = create_transform(vit.load_pretrained(DIGITS))
    stream = decode([path] * 1000, lambda image: (decoded.append(1), transform(image))[1])
    first = next(stream)
    time.sleep(0.2)
    assert first[1].shape == (3, 32, 32) and 1 <= len(decoded) <= 8 * 8 + 9
    stream.close()
    assert len(decoded) < 200


def test_counts_have_the_number_of_their_noun():
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
