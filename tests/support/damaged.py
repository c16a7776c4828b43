"""Readers of files against damage: what they must refuse, and with how much memory."""

import io
import os
import random
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vit.weights.checkpoint import Checkpoint, CheckpointError

Read = Callable[[Path], Checkpoint]


def values() -> dict[str, Tensor]:
    """A small state dict of many dtypes, with a scalar and values that no other dtype holds."""
    normal = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e3
    return {
        "head/kernel": normal.float(),
        "head/half": normal.half(),
        "brain": normal.bfloat16(),
        "double": normal,
        "opt/state/step": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "byte": torch.arange(256, dtype=torch.uint8),
        "key": torch.tensor([2**31 + 1, 5]).to(torch.uint32),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits are equal."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].contiguous().numpy(force=True).tobytes() == b[name].contiguous().numpy(force=True).tobytes()
        if a[name].dtype != torch.bfloat16
        else b[name].dtype == torch.bfloat16 and torch.equal(a[name].view(torch.int16), b[name].view(torch.int16))
        for name in a
    )


@contextmanager
def taking_less_than(size: int) -> Iterator[None]:
    """Fail where Python and NumPy take `size` bytes at any moment within the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def refused(read: Read, path: Path, content: bytes | None = None, match: str | None = None) -> None:
    """The file is refused with an error that names it, and without taking memory for what it claims."""
    if content is not None:
        path.write_bytes(content)
    with taking_less_than(16 * 2**20), pytest.raises(CheckpointError, match=match) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def survives(read: Read, path: Path, content: bytes, right: dict[str, Tensor] | None = None) -> bool:
    """Whether damaged content loads; it must be refused, or be `right`, or at least not be more than there is."""
    path.write_bytes(content)
    try:
        checkpoint = read(path)
    except CheckpointError:
        return False
    if right is not None:
        assert same(checkpoint.tensors, right)
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) <= 2 * len(content)
    return True


def damaged(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Cuts and changes at random places, more of them at the end, where zip files have their list of members."""
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(content)
        place = (
            draw.randrange(max(0, len(data) - 1500), len(data)) if draw.random() < 0.5 else draw.randrange(len(data))
        )
        kind = draw.randrange(5)
        if kind == 0:
            del data[place : place + draw.choice((1, 2, 64, len(data)))]
        elif kind == 1:
            data[place:place] = draw.randbytes(draw.choice((1, 8, 300)))
        elif kind == 2:
            data[place : place + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"))
        else:
            data[place] ^= draw.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
        yield bytes(data)


def rezipped(*members: tuple[str, bytes]) -> bytes:
    """A zip file of these members, names as they are."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # of two members by one name
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def patched(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)
