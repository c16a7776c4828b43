"""NumPy's .npz files in and out: a zip file of arrays, as JAX's checkpoints are, checked before memory is allocated.

The format (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html): per member a header with dtype,
order and shape, then the values. numpy.load would trust the header and allocate what it asks for.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError

# NumPy has no bfloat16: JAX's files hold it as two bytes of unknown type.
_DTYPES = {
    "f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "V2": torch.bfloat16,
    "i8": torch.int64, "i4": torch.int32, "i2": torch.int16, "i1": torch.int8,
    "u8": torch.uint64, "u4": torch.uint32, "u2": torch.uint16, "u1": torch.uint8, "b1": torch.bool,
}  # fmt: skip
_CODES = {dtype: np.dtype(code).str for code, dtype in _DTYPES.items()}

_HEADER = 4096  # characters: NumPy writes 128, and parsing Python syntax takes much more memory than the text
_COMPRESSION = 16  # times the file's size: weights hardly compress (0.93); what does is empty or hostile
_CHUNK = 2**20  # bytes


def read_npz(path: Path) -> Checkpoint:
    """Read a whole file, compressed or not, as `numpy.load(path, allow_pickle=False)` would.

    Each array is read into its own memory, in C order and the machine's byte order; `|V2` becomes bfloat16. The names
    are the members' names without ".npy".

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not an .npz file, a damaged one, one that holds anything besides arrays of numbers, or one that
            would take much more memory than it has bytes.
    """
    with reading(path, "a complete .npz file") as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        entries = checked_entries(path, file, archive)
        if not entries:
            raise CheckpointError(f"{path} is empty, expected arrays")
        for entry in entries:
            if not entry.filename.endswith(".npy"):
                raise CheckpointError(f"{path} has a member {entry.filename!r}, expected .npy members only")
        wanted = sum(entry.file_size for entry in entries)
        if wanted > _COMPRESSION * size:
            raise CheckpointError(
                f"{path} has {size} bytes that unpack to {wanted}, expected at most {_COMPRESSION} times that"
            )
        with path.open("rb") as again, ThreadPoolExecutor(2) as threads:  # which end before the file is closed
            sha256 = threads.submit(file_sha256, again)
            tensors, checks = {}, []
            for entry in entries:
                where = f"{path}: {entry.filename}"
                memory = unpack(where, file, archive, entry)
                checks.append(threads.submit(_check_crc, where, memory, entry.CRC))
                tensors[entry.filename[: -len(".npy")]] = _as_array(where, memory)
            for check in checks:
                check.result()
        return Checkpoint(path, tensors, {}, sha256.result())


def _as_array(where: str, memory: Tensor) -> Tensor:
    """The array in a member's bytes. These are not changed: their CRC may still be computed."""
    start = memory[: _HEADER + 12].numpy().tobytes()  # the format's name, its version, the header's length: 12 bytes
    header = io.BytesIO(start)
    shape, transposed, dtype = _read_header(where, header)
    memory = memory[header.tell() :]
    if len(memory) != (length := math.prod(shape) * dtype.itemsize):
        raise CheckpointError(f"{where} has {len(memory)} bytes of values, expected {length} for {shape} {dtype}")
    if header.tell() % dtype.itemsize:  # NumPy aligns the values, other writers may not
        memory = memory.clone()
    if not dtype.isnative:
        memory = torch.from_numpy(memory.numpy().view(dtype).byteswap().view(np.uint8))
    tensor = memory.view(_DTYPES[dtype.str[1:]])
    if transposed:
        return tensor.reshape(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)).contiguous()
    return tensor.reshape(shape)


def unpack(where: str, file: io.BufferedReader, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    """The bytes of a member, not yet checked."""
    memory = torch.empty(entry.file_size, dtype=torch.uint8, device="cpu")  # whatever the default device is
    values, end = memory.numpy().data, 0
    with archive.open(entry) as member:  # which compares the member's own header with the list at the archive's end
        if entry.compress_type == zipfile.ZIP_STORED:  # straight into memory: zipfile would copy each byte three times
            file.seek(entry.header_offset)
            name, extra = struct.unpack("<26x2H", file.read(30))
            file.seek(name + extra, os.SEEK_CUR)
            end = file.readinto(values)
        else:
            while chunk := member.read(_CHUNK):
                values[end : end + len(chunk)] = chunk
                end += len(chunk)
    if end != entry.file_size:
        raise CheckpointError(f"{where} ends after {end} of {entry.file_size} bytes")
    return memory


def _check_crc(where: str, memory: Tensor, crc: int) -> None:
    if zlib.crc32(memory.numpy().data) != crc:
        raise CheckpointError(f"{where} is damaged: its values do not match their CRC")


def _read_header(where: str, file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is in Fortran order, and dtype. Leaves the file at the beginning of the values."""
    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise CheckpointError(f"{where} has version {version}, expected (1, 0) or (2, 0)")
    shape, transposed, dtype = readers[version](file, max_header_size=_HEADER)
    if dtype.hasobject:
        raise CheckpointError(f"{where} holds Python objects, which are code: expected numbers")
    if dtype.names is not None or dtype.subdtype is not None or dtype.str[1:] not in _DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype}, expected one of {', '.join(_DTYPES)}")
    if any(side < 0 for side in shape):
        raise CheckpointError(f"{where} has shape {shape}: sides cannot be negative")
    if 0 in shape:
        raise CheckpointError(f"{where} has shape {shape}: it has no values")
    return shape, transposed, dtype


@contextmanager
def reading(path: Path, expected: str) -> Iterator[io.BufferedReader]:
    """The open file. Any error inside the block, from any library, becomes a CheckpointError."""
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        try:
            yield file
        except CheckpointError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            again = "; it was cut off or damaged: get it again" if isinstance(error, zipfile.BadZipFile) else ""
            raise CheckpointError(f"{path} is not {expected}: {type(error).__name__}: {reason}{again}") from None
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{path} changed while it was read")


def checked_entries(path: Path, file: io.BufferedReader, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members of a zip file.

    Raises:
        CheckpointError: they do not lie within the file, share names, or are encrypted, folders or oddly compressed.
    """
    entries = archive.infolist()
    size = os.fstat(file.fileno()).st_size
    _check_end(path, file, size, len(entries))
    if len({entry.filename for entry in entries}) < len(entries):
        raise CheckpointError(f"{path} has two members with the same name")
    for entry in entries:
        name = entry.filename
        utf8 = name.isascii() or entry.flag_bits & 0x800
        if not name.isprintable() or not utf8 or entry.orig_filename != name:  # zipfile cuts names at a zero byte
            raise CheckpointError(f"{path} has a member {entry.orig_filename!r}, expected a printable name in UTF-8")
        if name.endswith("/") or entry.external_attr & 0x10:  # torch would leave its memory uninitialized
            raise CheckpointError(f"{path}: {name} is a folder, expected files only")
        if entry.flag_bits & 0x41:
            raise CheckpointError(f"{path}: {name} is encrypted")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others are unpacked in one go
            raise CheckpointError(f"{path}: {name} has compression {entry.compress_type}, expected none or deflate")
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise CheckpointError(f"{path}: {name} has two sizes, {entry.file_size} and {entry.compress_size}")
    if sum(entry.compress_size for entry in entries) > size:
        raise CheckpointError(f"{path} has {size} bytes, but its members claim more: it is truncated")
    return entries


def _check_end(path: Path, file: io.BufferedReader, size: int, count: int) -> None:
    """Refuse a zip file whose list of members is wrong, or is one that another reader would not find.

    The usual end of a file: the list, its place and length in 64 bits (optional), its place and length in 32 bits. If
    that is damaged or forged, zipfile (which checks a file) and torch (which loads it) may find different lists.
    """
    file.seek(max(0, size - 98))
    end = file.read(98)
    number, total, length, offset, comment = struct.unpack("<8x2H2LH", end[-22:])
    usual = end[-22:-18] == b"PK\x05\x06" and comment == 0
    stop = size - 22
    if end[-42:-38] == b"PK\x06\x07":
        stop = size - 98
        number64, total64, length64, offset64 = struct.unpack("<24x4Q", end[:56])
        at = struct.unpack("<8xQ4x", end[56:76])[0]
        usual &= end[:4] == b"PK\x06\x06" and at == stop and number in (number64, 0xFFFF)
        usual &= total in (total64, 0xFFFF) and length in (length64, 2**32 - 1) and offset in (offset64, 2**32 - 1)
        number, total, length, offset = number64, total64, length64, offset64
    if not usual or offset + length != stop or not number == total == count:
        raise CheckpointError(f"{path} does not end as torch.save ends its files: it is damaged")


def file_sha256(file: io.BufferedReader) -> str:
    """The sha256 of a whole open file."""
    file.seek(0)
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK))
    while size := file.readinto(chunk):
        digest.update(chunk[:size])
    return digest.hexdigest()


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file as numpy.savez does, bfloat16 as JAX does. Weights are copied only from other devices.

    All members are dated 1980, so that the same weights give the same file.

    Raises:
        CheckpointError: a dtype that the format cannot hold.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, _CODES))}")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            header = {"descr": _CODES[tensor.dtype], "fortran_order": False, "shape": tuple(tensor.shape)}
            values = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                npy.write_array_header_1_0(member, header)
                member.write(values.data)
