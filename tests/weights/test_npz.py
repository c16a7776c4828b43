"""NumPy's files: read and written bit for bit; files with wrong claims are refused before they do harm."""

import hashlib
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged import Touch, damaged, patched, refused, rezipped, same, survives, values
from torch import nn

from vit.weights.checkpoint import CheckpointError
from vit.weights.formats.npz import read_npz, write_npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpys_files_are_read_bit_for_bit(tmp_path: Path, save: Callable) -> None:
    path = tmp_path / "weights.npz"
    expected = {name: tensor for name, tensor in values().items() if tensor.dtype != torch.bfloat16}
    save(path, **{name: tensor.numpy() for name, tensor in expected.items()})
    checkpoint = read_npz(path)
    assert same(checkpoint.tensors, expected)
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.path == path
    assert not checkpoint.metadata and not checkpoint.others


def test_our_files_are_read_by_numpy_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    write_npz(path, values())
    assert same(read_npz(path).tensors, values())
    with np.load(path, allow_pickle=False) as file:
        theirs = {name: file[name] for name in file}
    assert list(theirs) == list(values())
    assert theirs["brain"].dtype == np.dtype("V2")
    assert np.array_equal(theirs.pop("brain").view(np.int16), values()["brain"].view(torch.int16).numpy())
    for name, array in theirs.items():
        assert array.dtype == values()[name].numpy().dtype
        assert np.array_equal(array, values()[name].numpy())
    write_npz(tmp_path / "again.npz", values())
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_large_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with sizes and places in 64 bits, which zipfile is made to write for small ones."""
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 100)
        write_npz(tmp_path / "a.npz", values())
    assert (tmp_path / "a.npz").read_bytes()[-42:-38] == b"PK\6\7"
    assert same(read_npz(tmp_path / "a.npz").tensors, values())


def test_views_and_parameters_are_written_by_their_values(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    write_npz(tmp_path / "a.npz", {"t": weight.T, "row": weight[1]})
    tensors = read_npz(tmp_path / "a.npz").tensors
    assert same(tensors, {"t": weight.detach().T.contiguous(), "row": torch.arange(4.0, 8.0)})
    with pytest.raises(CheckpointError, match="c has dtype torch.complex64"):
        write_npz(tmp_path / "b.npz", {"c": torch.ones(2, dtype=torch.complex64)})
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">i8", "<f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_byte_and_memory_order_are_converted(tmp_path: Path, dtype: str, order: Any) -> None:
    array = np.asarray(np.arange(24).reshape(2, 3, 4), dtype=dtype, order=order)
    np.savez(tmp_path / "a.npz", a=array)
    with torch.device("meta"):
        tensor = read_npz(tmp_path / "a.npz").tensors["a"]
    assert tensor.is_contiguous()
    assert tensor.dtype == {"f4": torch.float32, "f2": torch.float16, "i8": torch.int64}[dtype[1:]]
    assert np.array_equal(tensor.numpy(), array)


def npz(header: str | bytes, data: bytes, version: bytes = b"\1\0", length: int | None = None) -> bytes:
    """An .npz file of one member with this header; `length` is its claimed length."""
    text = header.encode("latin1") if isinstance(header, str) else header
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text) if length is None else length)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY" + version + size + text + data)
    return file.getvalue()


def header(descr: str = "'<f4'", shape: str = "(2, 3)", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n"


def test_the_headers_below_are_refused_for_what_they_change(tmp_path: Path) -> None:
    for version in (b"\1\0", b"\2\0"):
        (tmp_path / "a.npz").write_bytes(npz(header(), bytes(24), version))
        assert same(read_npz(tmp_path / "a.npz").tensors, {"a": torch.zeros(2, 3)})


HEADERS: dict[str, tuple[bytes, str | None]] = {
        "larger shape": (npz(header(shape="(2, 4)"), bytes(24)), "24 bytes of values, expected 32"),
        "smaller shape": (npz(header(shape="(2, 2)"), bytes(24)), "24 bytes of values, expected 16"),
        "1000 times": (npz(header(shape="(2000, 3)"), bytes(24)), "expected 24000"),
        "a terabyte": (npz(header(shape="(1048576, 262144)"), b""), "0 bytes of values"),
        "overflow": (npz(header(shape=f"({2**62}, {2**62})"), bytes(24)), "24 bytes of values"),
        "overflow to the right number": (npz(header(shape=f"({2**63}, 2, 6)"), bytes(24)), "24 bytes of values"),
        "negative": (npz(header(shape="(-2, -3)"), bytes(24)), "cannot be negative"),
        "no values": (npz(header(shape="(0, 3)"), b""), "it has no values"),
        "no values, huge": (npz(header(shape=f"(0, {2**80})"), b""), "it has no values"),
        "shape of floats": (npz(header(shape="(2.0, 3)"), bytes(24)), "shape is not valid"),
        "objects": (npz(header("'|O'"), bytes(48)), "holds Python objects, which are code"),
        "structure": (npz(header("[('a', '<f4')]"), bytes(24)), "dtype"),
        "structure of objects": (npz(header("[('a', '|O')]"), bytes(48)), "Python objects"),
        "sub-arrays": (npz(header("('<f4', (3,))", "(2,)"), bytes(24)), "has dtype"),
        "sub-arrays in words": (npz(header("'3f4'", "(2,)"), bytes(24)), "has dtype"),
        "sub-arrays of two bytes": (npz(header("('|u1', (2,))", "(3,)"), bytes(6)), "has dtype"),
    "texts": (npz(header("'<U1'"), bytes(24)), "has dtype"),
        "bytes": (npz(header("'|S4'"), bytes(24)), "has dtype"),
        "complex": (npz(header("'<c8'", "(3,)"), bytes(24)), "has dtype complex64"),
        "dates": (npz(header("'<M8[s]'", "(3,)"), bytes(24)), "has dtype"),
        "four bytes without a meaning": (npz(header("'|V4'"), bytes(24)), "has dtype"),
        "two bytes with names": (npz(header("[('a', '|V1'), ('b', '|V1')]"), bytes(12)), "has dtype"),
        "nonsense": (npz(header("'zzz'"), bytes(24)), "zzz"),
        "dtype of None": (npz(header("None", "(3,)"), bytes(24)), "not a valid dtype|a.npz"),
        "dtype of a list": (npz(header("[[[]]]"), bytes(24)), None),
        "dtype of a number": (npz(header("5"), bytes(24)), None),
        "order": (npz(header(order="3"), bytes(24)), "fortran_order"),
        "no dictionary": (npz("[1, 2]\n", bytes(24)), "not a dictionary"),
        "no Python": (npz("{{{\n", bytes(24)), None),
        "code": (npz("__import__('os').system('exit')\n", bytes(24)), None),
        "parentheses": (npz("(" * 4000, bytes(24)), None),
        "minuses": (npz("-" * 4000 + "1", bytes(24)), None),
        "a long number": (npz(header(shape=f"({'9' * 4000},)"), bytes(24)), None),
        "zero bytes": (npz("\0" * 100, bytes(24)), None),
        "not UTF-8": (npz(b"\xff" * 100, bytes(24), b"\3\0"), "version"),
        "header longer than the file": (npz(header(), bytes(24), length=60000), None),
        "header shorter": (npz(header(), bytes(24), length=20), None),
        "header of 4 GB": (npz(header(), bytes(24), b"\2\0", 2**32 - 1), None),
        "header of 100 KB": (npz(header() + " " * 100_000, bytes(24), b"\2\0"), None),
        "a later version": (npz(header(), bytes(24), b"\3\0"), r"version \(3, 0\)"),
        "no .npy": (npz(header(), bytes(24)).replace(b"NUMPY", b"NUMPI"), None),
        "empty": (b"", "not a complete .npz file: BadZipFile"),
        "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a complete .npz file: BadZipFile"),
        "no member": (b"PK\5\6" + bytes(18), "is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "match"), HEADERS.values(), ids=HEADERS)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes, match: str | None) -> None:
    refused(read_npz, tmp_path / "a.npz", content, match)


def test_object_arrays_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([Touch(tmp_path / "ran")], dtype=object))
    refused(read_npz, tmp_path / "a.npz", match="holds Python objects")
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["a"]
    assert (tmp_path / "ran").exists()  # it would have


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (50 * 2**20,)})
        for _ in range(200):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2 * 2**20
    refused(read_npz, path, match="unpack to")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_unpack_in_one_go_are_refused(tmp_path: Path, compression: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("a.npy", bytes(20 * 2**20))
    refused(read_npz, tmp_path / "a.npz", match="has compression")


def test_odd_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    good = npz(header(), bytes(24))
    array = zipfile.ZipFile(io.BytesIO(good)).read("a.npy")
    refused(read_npz, path, rezipped(("a.npy", array), ("a.npy", array)), "two members with the same name")
    refused(read_npz, path, rezipped(("a.npy", array), ("readme.txt", b"")), "expected .npy members only")
    refused(read_npz, path, rezipped(("a\n.npy", array)), "printable")
    refused(read_npz, path, good.replace(b"a.npy", b"\0.npy"), "printable")
    refused(read_npz, path, good.replace(b"a.npy", b"\xe4.npy"), "printable")
    refused(read_npz, path, rezipped(("ä.npy", array)).replace("ä".encode(), b"\xff\xff"), "UnicodeDecodeError")
    encrypted = bytearray(good)
    encrypted[6] |= 1
    encrypted[good.index(b"PK\1\2") + 8] |= 1
    refused(read_npz, path, bytes(encrypted), "a.npz: a.npy is encrypted")
    at = good.index(b"PK\1\2") + 20  # compressed, then uncompressed size
    size = struct.unpack("<I", good[at : at + 4])[0]
    refused(read_npz, path, patched(good, len(good) - 12, b"\0"), "does not end as torch.save")
    refused(read_npz, path, good[: at + 4] + struct.pack("<I", size + 4) + good[at + 8 :], "two sizes")
    refused(read_npz, path, good[:at] + struct.pack("<2I", 10**9, 10**9) + good[at + 8 :], "truncated")
    refused(read_npz, path, patched(good, at, struct.pack("<2I", len(good) + 1, len(good) + 1)), "truncated")
    write_npz(path, {"ä": torch.ones(2), "a": torch.ones(3)})
    assert list(read_npz(path).tensors) == ["ä", "a"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_files_are_refused(tmp_path: Path, save: Callable) -> None:
    path = tmp_path / "a.npz"
    right = {name: tensor for name, tensor in values().items() if tensor.dtype != torch.bfloat16}
    save(path, **{name: tensor.numpy() for name, tensor in right.items()})
    content = path.read_bytes()
    for stop in range(0, len(content), len(content) // 50):
        refused(read_npz, path, content[:stop])
    loaded = sum(survives(read_npz, path, data, right) for data in damaged(content, 400, seed=1))
    assert 0 < loaded < 200  # some bytes do not matter: dates, permissions


def test_members_that_unpack_to_less_than_they_say_are_refused(tmp_path: Path) -> None:
    """zipfile only compares checksums, which are right here."""
    values = header().encode() + bytes(24)
    whole = b"\x93NUMPY\1\0" + struct.pack("<H", len(header())) + values
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", whole[:-8])
    content = file.getvalue().replace(struct.pack("<I", len(whole) - 8), struct.pack("<I", len(whole)))
    refused(read_npz, tmp_path / "a.npz", content, "a.npy ends after 84 of 92 bytes")


def test_a_changed_value_is_noticed(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", values())
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(values()["double"].numpy().tobytes()) + 3] ^= 1
    refused(read_npz, tmp_path / "a.npz", bytes(content), "CRC")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("spaces", [0, 1, 2, 4, 8])
def test_values_may_begin_anywhere(tmp_path: Path, compression: int, spaces: int) -> None:
    """NumPy pads its headers to 64 bytes; other writers may not."""
    array = np.linspace(0, 1, 5)
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': (5,)}}{' ' * spaces}\n".encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + array.tobytes())
    assert np.array_equal(read_npz(tmp_path / "a.npz").tensors["a"].numpy(), array)


def test_a_large_npz_file_is_hashed_to_its_end(tmp_path):
    """The hash is computed in another thread, and may end after the reading."""
    path = tmp_path / "m.npz"
    np.savez(path, a=np.ones(6_000_000, dtype=np.float32))
    for _ in range(3):
        assert read_npz(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
