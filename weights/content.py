"""What a file really is, by its first bytes: pointers, web pages and archives pass under the names of weights."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

_AGAIN = "download the file itself; a login, error or preview page came instead"
_UNPACK = "unpack it, and load the file that was in it"
_FOREIGN = "save the weights as safetensors from the library that wrote it"
_PLAIN = (
    "a plain pickle, as pickle.dump writes",
    "load it in Python if you trust it, and save its tensors with torch.save or safetensors",
)

# What a file begins with, in lower case: what it is, and what to do.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "run `git lfs pull` where it was cloned"),
    (b"/annex/objects/", "a git-annex pointer", "run `git annex get` on it"),
    (b"<!doctype html", "a web page (HTML)", _AGAIN),
    (b"<html", "a web page (HTML)", _AGAIN),
    (
        b'<?xml version="1.0"?>\n<net ',
        "a graph of OpenVINO's",
        "name the checkpoint that it was made from; vit.load_exported opens exported files",
    ),
    (b"<", "an XML or HTML text", _AGAIN),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"bzh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zxz", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"rar!", "a rar archive", _UNPACK),
    (b"\x89hdf\r\n", "an HDF5 file, as Keras and TensorFlow write", _FOREIGN),
    (b"gguf", "a GGUF file", _FOREIGN),
    (b"\x93numpy", "a single NumPy array (.npy)", "save all of the model's arrays, by name, with numpy.savez"),
    (b"\x89png", "a picture", "name the file of the weights"),
    (b"\xff\xd8\xff", "a picture", "name the file of the weights"),
    (b"%pdf", "a PDF", "name the file of the weights"),
)
# The formats that are read: how an error calls them, and the ending that they need.
_FORMATS = {
    "safetensors": ("a safetensors file", ".safetensors"),
    "torch": ("a file of torch.save", ".pth"),
    "npz": ("an .npz file", ".npz"),
    "onnx": ("an ONNX file", ".onnx"),
    "json": ("a JSON text", ".json"),
}
_BY_ENDING = {".safetensors": "safetensors", ".npz": "npz", ".onnx": "onnx", ".json": "json"}  # all others: "torch"
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's first pickle before 1.6, after the protocol or a frame
_TABLE = b"W\xfb\x80\x8b$uG\xdb"  # how LevelDB's tables end
_TEXT = "a text that begins with"
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")


def mistaken(path: Path, ending: str) -> str:
    """What is wrong with a file that is recognised as something else than its ending says; "" if it may be that.

    Raises:
        FileNotFoundError: no such file.
    """
    expected = _BY_ENDING.get("." + ending.rpartition(".")[2], "torch")
    found = recognise(path)
    return "" if found in (None, expected) else f"{path} is {describe(found)}; expected {_FORMATS[expected][0]}"


def is_text(path: Path) -> bool:
    """Whether it is JSON by its first bytes, or a text of no known kind."""
    found = recognise(path)
    return found == "json" or (found is not None and found[0].startswith(_TEXT))


def describe(found: str | tuple[str, str] | None) -> str:
    """What was recognised, and what to do."""
    if found is None:
        return "of an unknown kind"
    if isinstance(found, str):
        what, ending = _FORMATS[found]
        return f"{what}: rename it to end in {ending}"
    return f"{found[0]}: {found[1]}"


def recognise(path: Path) -> str | tuple[str, str] | None:
    """One of `_FORMATS`, or else what a file is and what to do; None if it could be anything."""
    with path.open("rb") as file:
        start = file.read(512)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read(8)
    if not start:
        return "empty", "copy or download it again"
    if not start.strip(b"\0"):
        return "a file that begins with zeros", "its download did not finish: start it again"
    if re.match(rb".{3}[\0-\x0f]\0{4}\{", start, re.DOTALL):  # the header's length, below 2**28, and the header
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return _in_zip(path)
    if re.match(rb"\x80[\x02-\x05]", start):
        return "torch" if _MAGIC in start[:32] else _PLAIN
    if re.match(rb"\x08[\x01-\x20][\x12\x1a\x22\x3a]", start):  # the version of ONNX, then its maker or the graph
        return "onnx"
    if start[257:262] == b"ustar":
        return "a tar archive", f"{_UNPACK}; if torch before 0.1.10 wrote it, save it again with a newer torch"
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite file", _FOREIGN
    if end == _TABLE:
        return "a part of a TensorFlow checkpoint", _FOREIGN
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, what, do in _STARTS:
        if text.lower().startswith(beginning):
            return what, do
    return _as_text(text)


def _as_text(start: bytes) -> str | tuple[str, str] | None:
    words = start.decode("utf-8", errors="ignore")
    if len(words.encode()) < len(start) - 3 or not all(
        c.isprintable() or c.isspace() for c in words
    ):  # a cut character
        return None
    if words.startswith(("{", "[")):
        return "json"
    if ".git/annex/objects/" in words:
        return "a git-annex pointer", "run `git annex get` on it"
    beginning = words.strip().partition("\n")[0][:40]
    return f"{_TEXT} {beginning!r}" if beginning else "a blank text", "download or copy the file itself"


def _in_zip(path: Path) -> str | tuple[str, str] | None:
    """By the names of the members. A damaged zip file is left to its reader's error."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many kinds
        return None
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if all(name.endswith(".npy") for name in names):
        return "npz"
    if "model.weights.h5" in names:
        return "a Keras file", _FOREIGN
    if any(name.endswith("archive_format") for name in names):
        return "a program of torch.export", "save model.state_dict()"
    return f"a zip archive of {', '.join(map(repr, names[:3]))}{' ...' if len(names) > 3 else ''}", _UNPACK


def unfinished(path: Path) -> bool:
    """Whether a name is that of a download that goes on or broke off."""
    return path.name.lower().endswith(_UNFINISHED)
