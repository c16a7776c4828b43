"""Checkpoints for the fuzzer: tiny sound ones in every format, and all the ways in which they are damaged.

`make_case(seed, number)` is a pure function: the same numbers give the same files. Each case states the expected
outcome: "refused", "loads" (exactly what the file then holds) or "any", which is one of the two.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import random
import re
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vit
from vit.weights import convert, save_checkpoint

State = dict[str, np.ndarray]
Files = dict[str, bytes]
Outcome = tuple[Files, str]

CONFIG = vit.ViTConfig(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, mlp_ratio=2.0)
HEADS = {"num_heads": 2}
INTEGERS = (0, 1, -1, 2, 7, 8, 127, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1)
BEYOND = (2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 1e300, 0.5)
MARKER = "ran"  # the file that code in a checkpoint would make, in the working directory
BOMB = 96 * 2**20  # bytes


@dataclass(frozen=True)
class Base:
    """A sound checkpoint."""

    name: str
    kind: str
    layout: str
    state: State = field(repr=False)
    write: Callable[[State], Files] = field(repr=False)
    files: Files = field(repr=False)
    entry: str = ""  # the file to load; "": the folder
    known: dict[str, Any] = field(default_factory=dict)  # what only the caller can state
    wrapper: str = ""  # what precedes every name
    sealed: bool = False  # whether it carries its own sha256
    beside: tuple[str, ...] = ()  # files that describe the model


@dataclass(frozen=True)
class Case:
    """A damaged checkpoint."""

    base: Base
    mutation: str
    files: Files = field(repr=False)
    expected: str


# ---------------------------------------------------------------- sound checkpoints


@cache
def bases() -> list[Base]:
    """All of them. They are small, because only reading is tested."""
    model = vit.ViT(CONFIG)
    draw = np.random.default_rng(0)
    tensors = {name: torch.from_numpy(draw.normal(0, 1, t.shape).astype("f4")) for name, t in model.named_parameters()}
    model.load_state_dict(tensors)
    states = {layout: _state(tensors, layout) for layout in ("vit", "timm", "transformers", "augreg", "big_vision")}
    timm, transformers, augreg = states["timm"], states["transformers"], states["augreg"]
    nested = {f"model.{name}": array for name, array in timm.items()}
    folders = {layout: _written(model, layout) for layout in ("vit", "timm", "transformers")}
    header = _header(folders["vit"]["model.safetensors"])[0]["__metadata__"]
    result = [
        _base("ours", "safetensors", "vit", states["vit"], partial(_write_ours, header), sealed=True),
        _base("timm's", "safetensors", "timm", timm, lambda state: {"model.safetensors": safetensors_bytes(state)},
              known=HEADS),
        _base("transformers' folder", "safetensors", "transformers", transformers,
              partial(_in_folder, folders["transformers"]), beside=("config.json", "preprocessor_config.json")),
        _base("augreg", "npz", "augreg", augreg, partial(_write_npz, np.savez), "w.npz"),
        _base("augreg, compressed", "npz", "augreg", augreg, partial(_write_npz, np.savez_compressed), "w.npz"),
        _base("big_vision", "npz", "big_vision", states["big_vision"], partial(_write_npz, np.savez), "w.npz"),
        _base("zip", "pth", "timm", nested, partial(_write_pth, True), "w.pth", HEADS, "model."),
        _base("legacy", "pth", "timm", nested, partial(_write_pth, False), "w.pth", HEADS, "model."),
        _base("torchscript's names", "onnx", "timm", timm, _write_onnx, "w.onnx", HEADS),
        _base("timm's config", "config", "timm", timm, partial(_in_folder, folders["timm"]), beside=("config.json",)),
        _base("transformers' config", "config", "transformers", transformers,
              partial(_in_folder, folders["transformers"]), beside=("config.json", "preprocessor_config.json")),
        _base("two shards", "sharded", "timm", timm, _write_shards, "model.safetensors.index.json", HEADS),
    ]  # fmt: skip
    assert result[0].files == folders["vit"]
    return result


def _base(name: str, kind: str, layout: str, state: State, write: Callable, *args: Any, **more: Any) -> Base:
    return Base(name, kind, layout, state, write, write(state), *args, **more)


def _state(tensors: Mapping[str, torch.Tensor], layout: str) -> State:
    converted = convert(dict(tensors), "vit", layout, CONFIG).state_dict
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in converted.items()}


def _written(model: vit.ViT, layout: str) -> Files:
    """The folder that `save_checkpoint` writes."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what a layout cannot hold
        save_checkpoint(model, folder, layout)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


_DTYPES = {"f4": "F32", "f2": "F16", "f8": "F64", "i4": "I32"}


def safetensors_bytes(state: State, metadata: dict[str, str] | None = None, order: list[str] | None = None) -> bytes:
    """A file with these tensors, arranged as our own writer arranges it."""
    pairs: list[tuple[str, Any]] = [] if metadata is None else [("__metadata__", metadata)]
    end, places = 0, {}
    for name, array in state.items():
        start, end = end, end + array.nbytes
        places[name] = {"dtype": _DTYPES[array.dtype.str[1:]], "shape": list(array.shape), "data_offsets": [start, end]}
    pairs += [(name, places[name]) for name in order or state]
    return join(pairs, b"".join(np.ascontiguousarray(array).tobytes() for array in state.values()))


def join(pairs: list[tuple[str, Any]], data: bytes) -> bytes:
    """A safetensors file of any header entries, and data."""
    text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in pairs) + "}"
    return _with_text(text.encode("utf-8", "surrogatepass"), data)


def _with_text(text: bytes, data: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a sound safetensors file, and the data."""
    stop = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:stop]), content[stop:]


def _write_ours(metadata: dict[str, str], state: State) -> Files:
    return {"model.safetensors": safetensors_bytes(state, metadata)}


def _in_folder(files: Files, state: State) -> Files:
    return files | {"model.safetensors": safetensors_bytes(state, {"format": "pt"})}


def _write_npz(save: Callable, state: State) -> Files:
    file = io.BytesIO()
    save(file, **state)
    return {"w.npz": file.getvalue()}


def _write_pth(new: bool, state: State, extra: Any = None) -> Files:
    """As a training script leaves it, with an optimizer's state and arguments beside the model."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}
    inside = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    content = {"model": inside, "optimizer": {"state": {0: torch.ones(2)}, "lr": 0.1}, "epoch": 3,
               "args": argparse.Namespace(lr=0.1, name="x")}  # fmt: skip
    content |= {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}
    content |= {} if extra is None else {"extra": extra}
    file = io.BytesIO()
    torch.save(content, file) if new else _save_legacy(content, file)
    return {"w.pth": file.getvalue()}


def _save_legacy(content: Any, file: io.BytesIO) -> None:
    """As torch before 1.6 wrote it. torch still can, but names memory by its address, which changes every time."""
    storages: list[Any] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, torch.storage.TypedStorage):
                return None
            storages.append(value)
            kind = getattr(torch, value._pickle_storage_type())
            return ("storage", kind, str(len(storages)), "cpu", value._size(), None)

    sizes = {"short": 2, "int": 4, "long": 4}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}
    for part in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(part, file, 2)
    Pickler(file, 2).dump(content)
    pickle.dump([str(i + 1) for i in range(len(storages))], file, 2)
    for storage in storages:
        values = torch.tensor([], dtype=torch.uint8).set_(storage._untyped_storage)
        file.write(struct.pack("<q", storage._size()) + values.numpy().tobytes())


def onnx_model(state: State) -> Any:
    """A graph as TorchScript's exporter writes it: weights of linear layers are nameless transposed constants."""
    from onnx import helper, numpy_helper

    nodes, constants = [], []
    for i, (name, array) in enumerate(state.items()):
        scope = name.removesuffix(".weight")
        if array.ndim != 2 or not name.endswith(".weight"):
            constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
            continue
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array.T), f"onnx::MatMul_{i}"))
        where = "/" + scope.replace(".", "/")
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"onnx::MatMul_{i}"], [f"y{i}"], name=f"{where}/MatMul"))
        nodes.append(helper.make_node("Add", [f"{scope}.bias", f"y{i}"], [f"z{i}"], name=f"{where}/Add"))
    return helper.make_model(helper.make_graph(nodes, "main_graph", [], [], constants))


def _write_onnx(state: State) -> Files:
    return {"w.onnx": onnx_model(state).SerializeToString()}


def _write_shards(state: State) -> Files:
    names = list(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    files = {file: safetensors_bytes({name: state[name] for name in part}) for file, part in parts.items()}
    where = {name: file for file, part in parts.items() for name in part}
    return files | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": where}).encode()}


# ---------------------------------------------------------------- bytes


def spoil(content: bytes, draw: random.Random, hot: int = 400) -> bytes:
    """One to three changes to bytes, half of them near the beginning or the end, where headers are."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        size = len(data)
        place = draw.randrange(size + 1)
        if draw.random() < 0.5:
            place = draw.choice((draw.randrange(min(hot, size) + 1), size - draw.randrange(min(hot, size) + 1)))
        draw.choice(_BYTES)(data, place, draw)
    return bytes(data)


def _flip(data: bytearray, place: int, draw: random.Random) -> None:
    if place < len(data):
        data[place] ^= 1 << draw.randrange(8)


def _set(data: bytearray, place: int, draw: random.Random) -> None:
    data[place : place + 1] = draw.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"0", b"9", b'"', b"{", b"\n", b"."))


def _overwrite(data: bytearray, place: int, draw: random.Random) -> None:
    noise = draw.randbytes(draw.choice((1, 2, 8, 64)))
    data[place : place + len(noise)] = noise


def _integer(data: bytearray, place: int, draw: random.Random) -> None:
    size = draw.choice((1, 2, 4, 8))
    number = draw.choice(INTEGERS) % 256**size
    data[place : place + size] = number.to_bytes(size, draw.choice(("little", "big")))


def _digit(data: bytearray, place: int, draw: random.Random) -> None:
    digits = [i for i in range(place, min(place + 200, len(data))) if 48 <= data[i] < 58]
    if digits:
        data[draw.choice(digits[:20])] = 48 + draw.randrange(10)


def _insert(data: bytearray, place: int, draw: random.Random) -> None:
    data[place:place] = draw.choice((b"\0" * 8, b" ", b"0", b"PK\3\4", draw.randbytes(draw.choice((1, 16, 300)))))


def _delete(data: bytearray, place: int, draw: random.Random) -> None:
    del data[place : place + draw.choice((1, 2, 8, 100, 1000))]


def _cut(data: bytearray, place: int, draw: random.Random) -> None:
    del data[place:]


def _splice(data: bytearray, place: int, draw: random.Random) -> None:
    start, size = draw.randrange(len(data) + 1), draw.choice((1, 4, 16, 100, 1000))
    data[place : place + size] = data[start : start + size]


def _duplicate(data: bytearray, place: int, draw: random.Random) -> None:
    data[place:place] = data[place : place + draw.choice((1, 8, 100, 1000))]


def _append(data: bytearray, place: int, draw: random.Random) -> None:
    data += draw.choice((b"\0", b"\n", b" " * 8, draw.randbytes(64)))


_BYTES = (_flip, _flip, _flip, _set, _overwrite, _integer, _digit, _digit, _insert, _delete, _cut, _splice, _duplicate,
          _append)  # fmt: skip


def bytes_changed(base: Base, draw: random.Random) -> Outcome:
    """Any file of the checkpoint, its bytes flipped, cut, overwritten, moved ..."""
    names = list(base.beside) if base.kind == "config" else [n for n in base.files if n not in base.beside]
    name = draw.choice(names)
    content = base.files[name]
    hot = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith(".safetensors") else 400
    return base.files | {name: spoil(content, draw, hot)}, "any"


# ---------------------------------------------------------------- weights, in any format


def _number(name: str) -> re.Match | None:
    return re.search(r"(?<=[._])\d+(?=[./])", name)


def _renumbered(name: str, new: Callable[[str], str]) -> str:
    """The name with another block's number."""
    found = _number(name)
    return name if found is None else name[: found.start()] + new(found.group()) + name[found.end() :]


def unchanged(state: State, draw: random.Random) -> tuple[State, str]:
    return state, "loads"


def blocks_swapped(state: State, draw: random.Random) -> tuple[State, str]:
    """Block 0 gets the keys of block 1 and the reverse, for all parameters or for one."""
    chosen = draw.choice([name for name in state if _number(name)])
    alike = {chosen, _renumbered(chosen, lambda n: str(1 - int(n)))} if draw.random() < 0.5 else set(state)
    swap = {name: _renumbered(name, lambda n: str(1 - int(n))) if name in alike else name for name in state}
    return {swap[name]: array for name, array in state.items()}, "loads"


def names_swapped(state: State, draw: random.Random) -> tuple[State, str]:
    """Two weights of one shape swap names."""
    one = draw.choice(list(state))
    other = draw.choice([name for name in state if state[name].shape == state[one].shape])
    return state | {one: state[other], other: state[one]}, "loads"


def gap(state: State, draw: random.Random) -> tuple[State, str]:
    """A block gets a number that leaves a gap."""
    old, new = draw.choice((("0", "2"), ("1", "2"), ("1", "11"), ("1", "1000000"), ("0", "9" * 30), ("1", "9" * 5000)))
    return {_renumbered(n, lambda number: new if number == old else number): a for n, a in state.items()}, "refused"


def odd_number(state: State, draw: random.Random) -> tuple[State, str]:
    """A block's number is written in a way that no layout writes it."""
    new = draw.choice(("00", "01", "-1", "+1", "1_0", "१", "²", "1e0", "0x1", " 1", "1 ", ""))
    return {_renumbered(n, lambda number: new if number == "1" else number): a for n, a in state.items()}, "refused"


def missing(state: State, draw: random.Random) -> tuple[State, str]:
    gone = draw.choice(list(state))
    return {name: array for name, array in state.items() if name != gone}, "refused"


def odd_name(state: State, draw: random.Random) -> tuple[State, str]:
    """A weight gets an unexpected name, which may contain control characters."""
    odd = draw.choice(("", " ", "a\nb", "\x1b[31mred", "\0", "x" * 3000, "\u202egnp", "\ud7ff", "..", "/",
                       "a/../../b", "norm.weight ", "NORM.WEIGHT", "é", "{}", "blocks.{}.norm1.bias"))  # fmt: skip
    name = draw.choice(list(state))
    if draw.random() < 0.5:
        odd = draw.choice((name + odd, odd + name)) if odd else name + "."
    prefix = "model." if name.startswith("model.") else ""
    odd = prefix + odd.removeprefix(prefix)
    if draw.random() < 0.5:
        return state | {odd: np.ones(3, "f4")}, "any"
    return {odd if key == name else key: array for key, array in state.items()}, "any"


def not_finite(state: State, draw: random.Random) -> tuple[State, str]:
    name = draw.choice(list(state))
    array = state[name].copy()
    array.flat[draw.randrange(array.size)] = draw.choice((np.nan, np.inf, -np.inf))
    return state | {name: array}, "refused"


def odd_values(state: State, draw: random.Random) -> tuple[State, str]:
    """Finite numbers at their limits."""
    name = draw.choice(list(state))
    array = state[name].copy()
    array.flat[draw.randrange(array.size)] = draw.choice((0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38))
    return state | {name: array}, "loads"


def other_values(state: State, draw: random.Random) -> tuple[State, str]:
    name = draw.choice(list(state))
    values = np.random.default_rng(draw.randrange(2**32)).normal(0, 1, state[name].shape)
    return state | {name: values.astype("f4")}, "loads"


def square_transposed(state: State, draw: random.Random) -> tuple[State, str]:
    """A square weight is transposed, which shapes cannot show."""
    side = CONFIG.embed_dim
    name = draw.choice([name for name, array in state.items() if array.size == side * side and array.ndim > 1])
    turned = np.ascontiguousarray(state[name].reshape(side, side).T).reshape(state[name].shape)
    return state | {name: turned}, "loads"


def other_shape(state: State, draw: random.Random) -> tuple[State, str]:
    name = draw.choice(list(state))
    array = state[name]
    others = (array[None], array[..., None], array.reshape(-1), array.T, array.reshape(*array.shape, *[1] * 30))
    return state | {name: draw.choice([other for other in others if other.shape != array.shape])}, "refused"


def other_dtype(state: State, draw: random.Random) -> tuple[State, str]:
    """All tensors get another floating dtype, or one does, or one gets whole numbers."""
    kind = draw.choice(("f2", "f8"))
    if draw.random() < 0.5:
        return {name: array.astype(kind) for name, array in state.items()}, "loads"
    name = draw.choice(list(state))
    return state | {name: state[name].astype(draw.choice((kind, "i4")))}, "refused"


CONTENT = (unchanged, blocks_swapped, names_swapped, gap, odd_number, missing, odd_name, not_finite, odd_values,
           other_values, square_transposed, other_shape, other_dtype)  # fmt: skip


def weights_changed(change: Callable, base: Base, draw: random.Random) -> Outcome:
    """Other weights or names, in an otherwise sound file."""
    state, expected = change(base.state, draw)
    try:
        files = base.write(state)
    except (ValueError, KeyError, UnicodeError):  # not every format can hold every name
        return bytes_changed(base, draw)
    return files, expected


# ---------------------------------------------------------------- safetensors


def _pairs(base: Base, draw: random.Random) -> tuple[str, list[tuple[str, Any]], bytes]:
    """A file of the checkpoint, its header's entries and its data."""
    name = draw.choice([name for name in base.files if name.endswith(".safetensors")])
    header, data = _header(base.files[name])
    return name, list(header.items()), data


def header_changed(change: Callable, base: Base, draw: random.Random) -> Outcome:
    name, pairs, data = _pairs(base, draw)
    content, expected = change(pairs, data, draw)
    return base.files | {name: content}, expected


def _pick(pairs: list[tuple[str, Any]], draw: random.Random) -> tuple[int, str, dict]:
    i = draw.choice([i for i, (name, _) in enumerate(pairs) if name != "__metadata__"])
    return i, pairs[i][0], dict(pairs[i][1])


def offsets(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Offsets that overlap, leave gaps, lie outside the file, run backwards or are not numbers."""
    i, name, entry = _pick(pairs, draw)
    start, end = entry["data_offsets"]
    wrong = draw.choice((*INTEGERS, *BEYOND, len(data) + 4, end + 4, start - 4))
    entry["data_offsets"] = draw.choice((
        [start, wrong], [wrong, end], [wrong, wrong], [end, start], [start + 4, end + 4], [start - 4, end - 4],
        [start], [start, end, end], [], None, {}, "0", [None, end], [str(start), end], [[start], end], [True, end],
        [0, len(data)], [len(data), len(data) + end - start], [start, start],
    ))  # fmt: skip
    same = entry["data_offsets"] == [start, end]
    return join([*pairs[:i], (name, entry), *pairs[i + 1 :]], data), "loads" if same else "refused"


def shapes(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Shapes that are huge, negative or empty, that overflow or are not numbers."""
    i, name, entry = _pick(pairs, draw)
    old = entry["shape"]
    wrong = draw.choice((*INTEGERS, *BEYOND))
    entry["shape"] = draw.choice((
        [wrong, *old[1:]], [*old, wrong], [wrong], [2**32, 2**32], [2**63, 2, *old], [2**40] * 3, [0, 2**62], [], None,
        {}, "8", [None], [old], [True, *old], [-1, *old[1:]], [-s for s in old], [1] * 100_000, [*old, 1], [*old, 0],
    ))  # fmt: skip
    return join([*pairs[:i], (name, entry), *pairs[i + 1 :]], data), "loads" if repr(entry["shape"]) == repr(
        old
    ) else "refused"


def dtypes(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    i, name, entry = _pick(pairs, draw)
    entry["dtype"] = draw.choice(("F16", "BF16", "F64", "I32", "U32", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64",
                                  "f32", "", "F32\n", None, 4, ["F32"], {}, "F" * 1000))  # fmt: skip
    if draw.random() < 0.3:  # with a shape of the same number of bytes
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        width = {"F16": 2, "BF16": 2, "F64": 8, "I64": 8, "BOOL": 1, "U8": 1, "F8_E4M3": 1}.get(str(entry["dtype"]), 4)
        entry["shape"] = [size // width]
    return join([*pairs[:i], (name, entry), *pairs[i + 1 :]], data), "refused"


def duplicate_keys(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One name twice: the same entry, another's, or another shape before or after; or one text of the header twice."""
    i, name, entry = _pick(pairs, draw)
    other = draw.choice((entry, _pick(pairs, draw)[2], entry | {"shape": [*entry["shape"], 1]}, {"dtype": "F32"}))
    place = draw.choice((i, i + 1, 0, len(pairs)))
    if pairs[0][0] == "__metadata__" and draw.random() < 0.3:
        text = json.dumps(pairs[0][1])
        key = draw.choice(list(pairs[0][1]))
        twice = text[:-1] + f", {json.dumps(key)}: {json.dumps(draw.choice(('', pairs[0][1][key])))}" + "}"
        content = join(pairs, data).replace(text.encode(), twice.encode())
        return _with_text(content[8 : len(content) - len(data)].rstrip(), data), "refused"
    return join([*pairs[:place], (name, other), *pairs[place:]], data), "refused"


def odd_entries(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Entries in other forms than objects with three fields."""
    i, name, entry = _pick(pairs, draw)
    other = draw.choice((list(entry.values()), [entry], None, 1, "x", [], {}, entry | {"more": [[[[1]]]]},
                         {key: entry[key] for key in list(entry)[1:]}, entry | {"dtype": ["F32"]}))  # fmt: skip
    return join([*pairs[:i], (name, other), *pairs[i + 1 :]], data), "any"


def not_utf8(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    _, name, _ = _pick(pairs, draw)
    bad = draw.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8", b"\x80", b"\xe2\x82", b"\\ud800", b"\\udfff"))
    content = join(pairs, data)
    place = content.index(json.dumps(name).encode()) + draw.randrange(1, len(name))
    return _with_text(content[8:place].rstrip() + bad + content[place : len(content) - len(data)], data), "refused"


def header_lengths(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """The first eight bytes hold another number."""
    content = join(pairs, data)
    right = len(content) - len(data) - 8
    wrong = draw.choice(
        (*INTEGERS, *BEYOND[:3], right - 1, right + 1, right + 8, right - 8, len(content), 10**8, -right)
    )
    return struct.pack("<Q", int(wrong) % 2**64) + content[8:], "refused"


def reordered(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """The same header in another order or with other spaces."""
    mixed = pairs[:]
    draw.shuffle(mixed)
    content = join(mixed, data)
    text = content[8 : len(content) - len(data)]
    text = draw.choice((text, text.replace(b", ", b","), text.replace(b": ", b" :\n "), text + b" " * 800))
    return _with_text(text, data), "loads"


def metadata(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """`__metadata__` is not an object of texts, or has other values."""
    old = dict(pairs[0][1]) if pairs[0][0] == "__metadata__" else {}
    rest = [pair for pair in pairs if pair[0] != "__metadata__"]
    garbage = _garbage(draw)
    key = draw.choice((*old, "vit.config", "vit.preprocessing", "vit.categories", "vit.provenance", "format", "x"))
    texts = (json.dumps(garbage), "", "{", "null", "[" * 2000, "0" * 64, "9" * 5000, "NaN", "\x1b[31m\n")
    new = draw.choice((
        garbage, old | {key: garbage}, old | {key: draw.choice(texts)}, {k: v for k, v in old.items() if k != key},
        [old], old | {"vit.seal": draw.choice(("", "0", "0" * 64, "f" * 64, "z" * 64))},
    ))  # fmt: skip
    return join([*rest, ("__metadata__", new)] if draw.random() < 0.5 else [("__metadata__", new), *rest], data), "any"


def inner_text(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes of the header's text are changed, and its length is corrected."""
    content = join(pairs, data)
    return _with_text(spoil(content[8 : len(content) - len(data)], draw, 4000), data), "any"


def nested(pairs: list, data: bytes, draw: random.Random) -> tuple[bytes, str]:
    i, name, _ = _pick(pairs, draw)
    content = join([*pairs[:i], *pairs[i + 1 :]], data)
    text = content[8 : len(content) - len(data)].rstrip()[:-1] + b", " + json.dumps(name).encode() + b": "
    deep = draw.choice((b"[" * 100_000, b'{"a":' * 50_000, b"[" * 100_000 + b"]" * 100_000, b"1" * 100_000))
    return _with_text(text + deep + b"}", data), "refused"


HEADERS = (offsets, shapes, dtypes, duplicate_keys, odd_entries, not_utf8, header_lengths, reordered, metadata,
           inner_text, nested)  # fmt: skip


# ---------------------------------------------------------------- zip files: npz and pth


class Touch:
    """Code in a pickle: creates the file MARKER if it is run."""

    def __init__(self, how: int) -> None:
        self.how = how

    def __reduce__(self) -> tuple:
        return (
            (os.system, (f"touch {MARKER}",)),
            (eval, (f"open({MARKER!r}, 'w').close()",)),
            (exec, (f"open({MARKER!r}, 'w').close()",)),
            (open, (MARKER, "w")),
            (os.mkdir, (MARKER,)),
            (os.symlink, ("x", MARKER)),
            (torch.load, (MARKER,)),
            (np.ones, (2**28,)),
            (bytearray, (2**30,)),
            (torch.Tensor, (2**28,)),
        )[self.how]


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in parts:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, data)
    return file.getvalue()


def zip_records(base: Base, draw: random.Random) -> Outcome:
    """A field of a local header, of the list of members or of its end is overwritten."""
    content = bytearray(base.files[base.entry])
    signature = draw.choice((b"PK\3\4", b"PK\1\2", b"PK\1\2", b"PK\5\6"))
    places = [found.start() for found in re.finditer(re.escape(signature), bytes(content))]
    if places:
        place = draw.choice(places) + draw.choice((4, 6, 8, 10, 14, 18, 20, 22, 24, 26, 28, 30, 32, 34, 38, 42))
        size = draw.choice((1, 2, 4))
        content[place : place + size] = (draw.choice(INTEGERS) % 256**size).to_bytes(size, "little")
    return base.files | {base.entry: bytes(content)}, "any"


def zip_members(base: Base, draw: random.Random) -> Outcome:
    """Members doubled, missing, added, renamed, recompressed, in folders, with bytes before or after."""
    if not base.files[base.entry].startswith(b"PK"):
        return bytes_changed(base, draw)
    parts = list(members(base.files[base.entry]).items())
    i = draw.randrange(len(parts))
    name, data = parts[i]
    odd = draw.choice(("../x.npy", "/x.npy", "a\\b.npy", name.upper(), name + "/", "x\0y.npy", "é.npy", "a\nb.npy",
                       ".npy", "x", "con.npy", "x" * 60_000 + ".npy", "archive/data/99", "archive/code/x"))  # fmt: skip
    compression = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    changed, expected = draw.choice((
        ([*parts, (name, data)], "refused"), (parts[:i] + parts[i + 1 :], "any"), ([*parts, (odd, data)], "any"),
        ([*parts[:i], (odd, data), *parts[i + 1 :]], "any"), (parts[::-1], "any"), ([], "refused"),
        (parts, "any" if base.kind == "pth" or compression > zipfile.ZIP_DEFLATED else "loads"),
    ))  # fmt: skip
    content = zipped(changed, compression)
    if draw.random() < 0.1:
        return base.files | {base.entry: draw.choice((content + b"x", b"x" * 30 + content))}, "any"
    return base.files | {base.entry: content}, expected


# ---------------------------------------------------------------- npz


@cache
def _zeros() -> bytes:
    """`BOMB` zeros, deflated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(BOMB // 2**20)), packer.flush()])


def raw_zip(parts: list[tuple[str, bytes, int, int, int]]) -> bytes:
    """A zip file with any claims: (name, bytes as stored, compression, size, CRC) of each member."""
    files, listed = b"", b""
    for name, data, method, size, crc in parts:
        common = struct.pack("<HHHHIIIHH", 0, method, 0, 33, crc, len(data), size, len(name), 0)
        listed += b"PK\1\2\x14\0\x14\0" + common + struct.pack("<HHHII", 0, 0, 0, 0, len(files)) + name.encode()
        files += b"PK\3\4\x14\0" + common + name.encode() + data
    count = len(parts)
    return files + listed + struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, count, count, len(listed), len(files), 0)


def bombs(base: Base, draw: random.Random) -> Outcome:
    """A member unpacks to much more than the file's size, and claims that or another size."""
    parts = members(base.files[base.entry])
    name = draw.choice(list(parts))
    true = _npy("'<f4'", "False", f"({BOMB // 4},)")  # a header that matches the data
    start = draw.choice((b"", parts[name][:128], true, true))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH) + _zeros()
    right = BOMB + len(start)
    size = draw.choice((right, right, right, BOMB, len(parts[name]), 2**31, 2**32 - 1, 0, 200_000))
    crc = zlib.crc32(start.ljust(size, b"\0")) if size == len(parts[name]) else draw.choice((0, 1))
    sound = [(key, data, 0, len(data), zlib.crc32(data)) for key, data in parts.items() if key != name]
    content = raw_zip([*sound, (name, packed, zipfile.ZIP_DEFLATED, size, crc)])
    return base.files | {base.entry: content}, "any" if size == len(parts[name]) else "refused"


def _npy(descr: str, order: str, shape: str) -> bytes:
    """The header before an array's values."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


def object_arrays(base: Base, draw: random.Random) -> Outcome:
    """An array of Python objects, which is a pickle, in one of the model's members or beside them."""
    parts = members(base.files[base.entry])
    file = io.BytesIO()
    if draw.random() < 0.5:
        np.save(file, np.array([Touch(draw.randrange(7))] * draw.choice((1, 8)), dtype=object), allow_pickle=True)
    else:
        kind = draw.choice(("'|O'", "[('a', '|O')]", "'O'", "('O', (2,))", "'|O8'", "[('a', '<f4'), ('b', 'O')]"))
        header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': (1,)}}".ljust(117) + "\n"
        code = pickle.dumps([Touch(draw.randrange(7))])
        file.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + code)
    parts[draw.choice([*parts, "extra.npy"])] = file.getvalue()
    return base.files | {base.entry: zipped(list(parts.items()))}, "refused"


def npy_headers(base: Base, draw: random.Random) -> Outcome:
    """A member's header has other content, in a sound zip file."""
    parts = members(base.files[base.entry])
    name = draw.choice(list(parts))
    data = parts[name]
    shape = re.search(rb"'shape': (\(.*?\))", data).group(1).decode()  # type: ignore[union-attr]
    values = {"descr": "'<f4'", "order": "False", "shape": shape}
    values |= draw.choice((
        {"descr": draw.choice(("'>f4'",) * 3 + ("'<i4'", "'<f8'", "'|V4'", "'<U1'", "'<c8'", "'zzz'", "None", "[]", "5",
                              "'f4'", "'=f4'", "'<f4,<f4'", "('<f4', (2,))", "'|S4'", "'<f2'", "'|V2'", "'<M8[s]'"))},
        {"order": draw.choice(("True", "True", "1", "None", "'C'", "[]"))},
        {"shape": draw.choice((*(f"({wrong},)" for wrong in (*INTEGERS, *BEYOND)), "(0, 8)", "()", "[8]", "8", "None",
                               "(1e9,)", "(8, -1)", "(" * 500, f"({'9' * 4000},)", "(True,)", shape[:-1] + " 1)"))},
    ))  # fmt: skip
    header = _npy(**values)
    text = header[10:].decode().rstrip()
    if draw.random() < 0.3:
        text = draw.choice((text + "garbage", text[:-1], f"__import__('os').system('touch {MARKER}')", "{}", "",
                            text[:-1] + ", 'more': 1}", text.replace("shape", "descr"), "-" * 3000 + "1"))  # fmt: skip
        version, size = draw.choice(((b"\1\0", "<H"), (b"\2\0", "<I"), (b"\3\0", "<I"), (b"\0\0", "<H")))
        length = draw.choice((len(text),) * 4 + (0, 1, len(text) + 1, 60_000))
        header = b"\x93NUMPY" + version + struct.pack(size, length) + text.encode()
    parts[name] = header + data[128:]
    return base.files | {base.entry: zipped(list(parts.items()))}, "any"


def member_bytes(base: Base, draw: random.Random) -> Outcome:
    """Bytes within a member are changed, and its checksum is corrected."""
    if not base.files[base.entry].startswith(b"PK"):
        return bytes_changed(base, draw)
    parts = members(base.files[base.entry])
    pickles = [name for name in parts if name.endswith(".pkl")]
    name = draw.choice(pickles if pickles and draw.random() < 0.8 else list(parts))
    parts[name] = spoil(parts[name], draw)
    return base.files | {base.entry: zipped(list(parts.items()))}, "any"


# ---------------------------------------------------------------- pth


def calls_out(base: Base, draw: random.Random) -> Outcome:
    """Code in the pickled dictionary: refused if it calls the system, or else passed over."""
    new = base.files[base.entry].startswith(b"PK")
    how = draw.randrange(10)
    code = Touch(how)
    extra = draw.choice((code, [code], {"a": code}, (code, code), argparse.Namespace(a=code), {code: 1}))
    return _write_pth(new, base.state, extra), "refused" if how < 6 else "loads"


_GLOBALS = ("os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "subprocess Popen",
            "torch.hub load", "torch load", "torch._utils _rebuild_wrapper_subclass", "numpy ones", "torch zeros",
            "torch.storage UntypedStorage", "torch._tensor _rebuild_from_type_v2", "torch Size", "torch LongStorage",
            "torch.nn.parameter Parameter", "torch ByteStorage", "torch DoubleStorage", "collections Counter",
            "torch._utils _rebuild_parameter", "torch float32", "functools partial")  # fmt: skip


def _spoil_pickle(content: bytes, draw: random.Random) -> bytes:
    """Globals are swapped, numbers changed, opcodes changed or moved."""
    kind = draw.randrange(4)
    if kind == 0:
        places = list(re.finditer(rb"c([\w.]+\n\w+)\n", content))
        if places:
            found = draw.choice(places)
            other = draw.choice((*_GLOBALS, draw.choice(places).group(1).decode().replace("\n", " ")))
            return content[: found.start(1)] + other.replace(" ", "\n").encode() + content[found.end(1) :]
    if kind == 1:
        places = list(re.finditer(rb"[KMJ](?=[\x00-\xff])", content[:4000]))
        if places:
            start = draw.choice(places).start()
            size = {b"K": 1, b"M": 2, b"J": 4}[content[start : start + 1]]
            number = draw.choice(INTEGERS)
            new = draw.choice((
                content[start : start + 1] + (number % 256**size).to_bytes(size, "little"),
                b"\x8a\x09" + number.to_bytes(9, "little", signed=True), b"J\xff\xff\xff\xff", b"N", b"\x88",
            ))  # fmt: skip
            return content[:start] + new + content[start + 1 + size :]
    if kind == 2:
        data = bytearray(content)
        data[draw.randrange(len(data))] = draw.choice(
            b"()].}NQRGJKMUXabcehjqrstu\x80\x81\x85\x86\x87\x88\x89\x8a\x93iB2"
        )
        return bytes(data)
    return spoil(content, draw, len(content))


def pickle_changed(base: Base, draw: random.Random) -> Outcome:
    """The pickle is changed, in an otherwise sound file."""
    content = base.files[base.entry]
    if not content.startswith(b"PK"):
        start = draw.choice((0, 0, 100))  # the state dict's pickle precedes the weights
        return base.files | {base.entry: content[:start] + _spoil_pickle(content[start:], draw)}, "any"
    parts = members(content)
    name = next(name for name in parts if name.endswith("data.pkl"))
    parts[name] = _spoil_pickle(parts[name], draw)
    return base.files | {base.entry: zipped(list(parts.items()))}, "any"


def record_sizes(base: Base, draw: random.Random) -> Outcome:
    """A tensor's memory is shorter or longer than the pickle says, missing, or another tensor's."""
    parts = members(base.files[base.entry])
    records = [name for name in parts if "/data/" in name]
    name, other = draw.choice(records), draw.choice(records)
    expected = draw.choice(("swap", "short", "long", "gone", "empty"))
    if expected == "swap":
        same = [key for key in records if len(parts[key]) == len(parts[name])]
        other = draw.choice(same)
        parts[name], parts[other] = parts[other], parts[name]
        return base.files | {base.entry: zipped(list(parts.items()))}, "loads"
    parts[name] = {"short": parts[name][:-4], "long": parts[name] + b"\0" * 4, "empty": b""}.get(expected, b"")
    if expected == "gone":
        del parts[name]
    return base.files | {base.entry: zipped(list(parts.items()))}, "refused"


# ---------------------------------------------------------------- onnx


def graph_changed(base: Base, draw: random.Random) -> Outcome:
    """Constants with a wrong shape, type or place, and names that lead elsewhere."""
    model = onnx_model(base.state)
    graph = model.graph
    constant, other = draw.choice(graph.initializer), draw.choice(graph.initializer)
    node = draw.choice(graph.node)
    kind = draw.randrange(9)
    if kind == 0:
        constant.dims[draw.randrange(len(constant.dims))] = draw.choice(INTEGERS)
    elif kind == 1:
        constant.data_type = draw.choice((0, 2, 6, 7, 9, 10, 11, 16, 17, 8, 99, -1))
    elif kind == 2:
        constant.raw_data = draw.choice((constant.raw_data[:-4], constant.raw_data + b"\0" * 4, b"", other.raw_data))
    elif kind == 3:
        constant.external_data.add(key="location", value=draw.choice(("/etc/passwd", "w.onnx", "../x", "x" * 5000)))
        constant.data_location = draw.choice((0, 1))
    elif kind == 4:
        constant.name = draw.choice((other.name, "", "onnx::x", "a\nb", "é", "cls_token", "x" * 10_000))
    elif kind == 5:
        node.input[draw.randrange(2)] = draw.choice((other.name, constant.name, "", "y0", "z0"))
    elif kind == 6:
        node.op_type = draw.choice(("Gemm", "Identity", "Concat", "Add", "Expand", "", "If", "Loop", "Constant"))
    elif kind == 7:
        graph.initializer.add().CopyFrom(constant)
        graph.initializer[-1].name = draw.choice((constant.name, other.name, "extra.weight", "val_1"))
    else:
        copies = [f"n{i}.weight" for i in range(draw.choice((1, 1000)))]
        graph.node.add(op_type="Identity", input=[constant.name], output=copies)
    return base.files | {base.entry: model.SerializeToString()}, "any"


# ---------------------------------------------------------------- JSON beside the weights

GARBAGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 16, 10**6, 2**31, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e308, float("inf"),
    float("nan"), "", "x", "8", "token", "x" * 3000, "\0", "a\nb\x1b[31m", "\ud800", [], [1], [8, 8], [0, 0], [1, 2, 3],
    [3, 8, 8], [3, 10**9, 10**9], [None], [[]], {}, {"a": 1}, {"0": "a"}, {"height": 8, "width": 8}, {"height": None},
    {"shortest_edge": 0}, {"0": "a", "1": "b", "2": "c"}, [["x"] * 50] * 50,
)  # fmt: skip
_KEYS = (
    "model_type", "architecture", "num_classes", "model_args", "pretrained_cfg", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "intermediate_size", "image_size", "patch_size", "layer_norm_eps", "hidden_act",
    "qkv_bias", "id2label", "mlp_ratio", "label_names", "label_descriptions", "global_pool", "input_size",
    "license", "size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "mean", "std",
    "crop_pct", "crop_mode", "num_register_tokens", "drop_path_rate", "weight_map", "num_channels", "interpolation",
)  # fmt: skip


def _garbage(draw: random.Random) -> Any:
    """A copy, because it may be changed further."""
    return copy.deepcopy(draw.choice(GARBAGE))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container within a JSON value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def json_changed(base: Base, draw: random.Random) -> Outcome:
    """A JSON file has other values, other types, or too much content."""
    name = draw.choice([n for n in base.files if n.endswith(".json")])
    content = json.loads(base.files[name])
    for _ in range(draw.choice((1, 1, 2, 4))):
        places = _places(content)
        if not places or draw.random() < 0.2:
            content[draw.choice(_KEYS)] = _garbage(draw)
            continue
        where, key = draw.choice(places)
        kind = draw.randrange(5)
        if kind == 0:
            del where[key]
        elif kind == 1 and isinstance(where, dict):
            where[draw.choice(_KEYS)] = where.pop(key)
        elif kind == 2 and len(places) > 1:
            other, other_key = draw.choice(places)
            where[key], other[other_key] = json.loads(json.dumps(other[other_key])), json.loads(json.dumps(where[key]))
        else:
            where[key] = _garbage(draw)
    return base.files | {name: json.dumps(content).encode()}, "any"


def json_text(base: Base, draw: random.Random) -> Outcome:
    """A JSON file is not JSON, or is nested too deep, or holds numbers that are too long."""
    name = draw.choice([n for n in base.files if n.endswith(".json")])
    old = base.files[name]
    deep = draw.choice((b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"1e" + b"9" * 1000, b"-Infinity", b"\xff",
                        b'"\\ud800"', b"NaN", b"[" * 900 + b"]" * 900))  # fmt: skip
    content = draw.choice((
        deep, b'{"x": ' + deep + b"," + old.lstrip()[1:], old[:-2] + b', "hidden_size": ' + deep + b"}", b"", b"null",
        b"[]", b"\xef\xbb\xbf" + old, old.decode().encode("utf-16"), old + old, b"\0" * 100, b"1",
    ))  # fmt: skip
    return base.files | {name: content}, "any"


def shards_changed(base: Base, draw: random.Random) -> Outcome:
    """The index names other files, or puts a tensor in the wrong file or in two."""
    files = dict(base.files)
    index = json.loads(files[base.entry])
    where, name = index["weight_map"], draw.choice(list(index["weight_map"]))
    first, second = sorted(set(where.values()))
    kind = draw.randrange(6)
    if kind == 0:
        del files[draw.choice((first, second))]
    elif kind == 1:
        files[first], files[second] = files[second], files[first]
    elif kind == 2:
        where[name] = draw.choice((
            "../w.safetensors", "/etc/passwd", "", ".", "x\0.safetensors", "x.safetensors", "config", first.upper(),
            None, 1, [first], f"./{first}", base.entry, "a\nb.safetensors",
        ))  # fmt: skip
    elif kind == 3:
        where[name] = first if where[name] == second else second
    elif kind == 4:
        del where[name]
    else:
        both = dict.fromkeys([n for n in where if where[n] == first]) | {name: None, draw.choice(list(where)): None}
        files[first] = safetensors_bytes({n: base.state[n] for n in both})
        if kind == 5 and [n for n in where if where[n] == first] == list(both):
            return files, "loads"
    files[base.entry] = json.dumps(index).encode()
    return files, "refused"


# ---------------------------------------------------------------- all of them

_CONTENT = {change.__name__: partial(weights_changed, change) for change in CONTENT}
_HEADERS = {change.__name__: partial(header_changed, change) for change in HEADERS}
_ZIP = {"zip_records": zip_records, "zip_members": zip_members, "member_bytes": member_bytes}
_JSON = {"json_changed": json_changed, "json_text": json_text}

MUTATIONS: dict[str, dict[str, Callable[[Base, random.Random], Outcome]]] = {
    "safetensors": _CONTENT | _HEADERS,
    "npz": _CONTENT | _ZIP | {"bombs": bombs, "object_arrays": object_arrays, "npy_headers": npy_headers},
    "pth": _CONTENT | _ZIP | {"calls_out": calls_out, "pickle_changed": pickle_changed, "record_sizes": record_sizes},
    "onnx": _CONTENT | {"graph_changed": graph_changed},
    "config": _JSON,
    "sharded": _CONTENT | _HEADERS | _JSON | {"shards_changed": shards_changed},
}
_BYTES_SHARE = 0.3  # the share of cases that are changed byte by byte
KINDS = tuple(MUTATIONS)


def make_case(seed: int, number: int, kinds: tuple[str, ...] = KINDS) -> Case:
    """The case of that number."""
    draw = random.Random(f"{seed}/{number}")
    kind = draw.choice(kinds)
    base = draw.choice([base for base in bases() if base.kind == kind])
    if draw.random() < _BYTES_SHARE:
        files, expected = bytes_changed(base, draw)
        mutation = "bytes"
    else:
        mutation = draw.choice(list(MUTATIONS[kind]))
        if base.name == "legacy" and mutation in ("record_sizes", "zip_records"):
            mutation = "pickle_changed"
        files, expected = MUTATIONS[kind][mutation](base, draw)
    if kind == "onnx" and mutation in ("odd_number", "odd_name") and expected == "refused":
        expected = "any"  # the graph's nodes give the right name for one that PyTorch cannot have
    if files == base.files:
        expected = "loads"
    elif base.sealed:
        expected = "refused" if expected == "refused" or has_seal(files["model.safetensors"]) else "any"
    return Case(base, mutation, files, expected)


def has_seal(content: bytes) -> bool:
    """Whether a file, damaged or not, still carries a hash of its content."""
    try:
        return "vit.seal" in _header(content)[0]["__metadata__"]
    except Exception:
        return False
