"""ONNX graphs in: their weights, under the names that they had in PyTorch.

PyTorch's exporters keep most names of weights, but lose them for weights that they transform. This is undone here:

- `x @ W.T` becomes a MatMul with a constant W.T named `onnx::MatMul_1966` or `val_12`.
- A class token becomes the constant that it is expanded to, `expand`, with one row for each image.
- A position embedding that the graph resizes becomes two constants, the class token's row and the grid.

A weight that a graph transforms in another way keeps its name in the metadata: the key is then missing, not wrong.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit.metadata import EXPORTED_KEY

from ..checkpoint import Checkpoint, CheckpointError, joint_sha256
from .onnx_data import DataFiles

# By TensorProto.DataType: our dtype, the field of the values if they are not in raw_data, and their type there.
_DTYPES = {
    1: (torch.float32, "float_data", "<f4"),
    2: (torch.uint8, "int32_data", "<u1"),
    3: (torch.int8, "int32_data", "<i1"),
    5: (torch.int16, "int32_data", "<i2"),
    6: (torch.int32, "int32_data", "<i4"),
    7: (torch.int64, "int64_data", "<i8"),
    9: (torch.bool, "int32_data", "<u1"),
    10: (torch.float16, "int32_data", "<u2"),  # the bits
    11: (torch.float64, "double_data", "<f8"),
    16: (torch.bfloat16, "int32_data", "<u2"),
}

_FOLDED = "pkg.onnxscript.optimizer.folded_from"  # "['blocks.0.attn.qkv.weight']", beside the constant val_12


def read_onnx(path: Path) -> Checkpoint:
    """Read an ONNX file's weights, each into its own memory, with its name and layout in PyTorch.

    The weights may lie in other files of the same folder or below it, as torch.onnx.export puts them into
    model.onnx.data; the hash is then that of all the files' hashes.

    Weights of linear layers become [out, in], position embeddings [1, 1 + N, D]. `metadata` lists constants without a
    name ("float32 [384, 384]") and those that are not weights ("int64 constant").

    Raises:
        FileNotFoundError: a file that holds its weights is missing.
        CheckpointError: the package onnx is missing; not an ONNX file, a damaged or inconsistent one, one with weights
            outside its folder, or names that contradict each other.
    """
    try:
        import onnx
    except ImportError:
        raise CheckpointError(f"{path} needs the package onnx: pip install onnx") from None
    data = path.read_bytes()
    size, sha256 = len(data), hashlib.sha256(data).hexdigest()
    try:
        model = onnx.load_model_from_string(data)  # does not open files of external data
        exported = any(entry.key == EXPORTED_KEY for entry in model.metadata_props)
    except Exception as error:  # protobuf's DecodeError, mostly
        raise CheckpointError(f"{path} is not a complete ONNX file: {error}") from None
    if exported:
        raise CheckpointError(
            f"{path} is an exported file: vit.load_exported runs it (vit predict, evaluate, features and bench do);"
            " name the checkpoint that it was made from"
        )
    del data  # the graph has a copy
    graph = model.graph
    _check_names(path, graph)
    with DataFiles(path) as beside:
        reader = _Reader(path, graph, size, beside)
        tensors = reader.tensors()
        others = beside.sha256s()
    if others:
        sha256 = joint_sha256(digest for _, digest in sorted([(path.name, sha256), *others.items()]))
    return Checkpoint(path, tensors, {f"constant {name}": kind for name, kind in reader.unnamed().items()}, sha256)


def _check_names(path: Path, graph: Any) -> None:
    """Refuse names that are not UTF-8: protobuf returns them as bytes, or raises when they are read."""
    try:
        names = [proto.name for proto in (*graph.initializer, *graph.node, *graph.value_info)]
        for node in graph.node:
            names += [node.op_type, *node.input, *node.output, *(attribute.name for attribute in node.attribute)]
        for value in graph.value_info:
            names += [text for entry in value.metadata_props for text in (entry.key, entry.value)]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    for name in names:
        if not isinstance(name, str):
            raise CheckpointError(f"{path} is damaged: the name {name!r} is not a text")


class _Reader:
    """A graph's constants by name, and the names of those that lost theirs, from the graph's nodes."""

    def __init__(self, path: Path, graph: Any, size: int, beside: DataFiles) -> None:
        self.path = path
        self.beside = beside
        self.nodes = list(graph.node)
        self.maker = {output: node for node in self.nodes for output in node.output}
        self.users: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for value in node.input:
                self.users[value].append(node)
        self.constants: dict[str, Any] = {}
        self._take_constants(graph, size)
        self.folded = _folded(graph)
        self.found: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}  # constant -> name, how to get its tensor
        self.positions: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {}  # name -> row, grid, the same
        self._find_linears()
        self._find_tokens()
        self._find_positions()

    def _take_constants(self, graph: Any, size: int) -> None:
        """Fill `constants`. The exporter keeps equal weights once; Identity nodes give them their other names."""
        for proto in graph.initializer:
            if self.beside.holds(proto):
                self.beside.count(proto)
            self._take_constant(proto.name, proto)
        for node in self.nodes:
            is_copy = node.op_type == "Identity" and node.input and node.input[0] in self.constants
            for name in node.output if is_copy else ():
                proto = self.constants[node.input[0]]
                size -= proto.ByteSize()  # a small file must not repeat one large weight a thousand times
                if size < 0:
                    raise CheckpointError(f"{self.path} repeats its weights until they outgrow the file: {proto.name}")
                if self.beside.holds(proto):
                    self.beside.count(proto)
                self._take_constant(name, proto)

    def _take_constant(self, name: str, proto: Any) -> None:
        if name in self.constants:
            raise CheckpointError(f"{self.path} has two constants named {name!r}")
        self.constants[name] = proto

    def _is_anonymous(self, name: str) -> bool:
        """Whether an exporter made up a name. Names without a dot may be parameters (cls_token) or not (expand)."""
        if "." not in name and (name in self.folded or re.fullmatch(r"val_\d+", name)):
            return True
        return not re.fullmatch(r"\w+(\.\w+)+|[A-Za-z_]\w*", name)

    def _find(self, constant: str, name: str, restore: Callable[[Tensor], Tensor]) -> None:
        before = self.found.setdefault(constant, (name, restore))
        if before[0] != name:
            raise CheckpointError(f"{self.path}: {constant} is used as both {before[0]} and {name}")
        if before[1] is not restore:
            raise CheckpointError(f"{self.path}: {constant}, which is {name}, is used in two layouts")

    # -- Linear layers -------------------------------------------------------------------------------------------------

    def _find_linears(self) -> None:
        """Name the weights of MatMul and Gemm nodes, which are [in, out] unless transB is set."""
        for node in self.nodes:
            if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
                continue
            weight = node.input[1]
            if len(self._dims(weight)) != 2 or any(a.name in ("alpha", "beta") and a.f != 1 for a in node.attribute):
                continue
            as_stored = node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1
            bias = self._bias_name(node, self._dims(weight)[0 if as_stored else 1])
            if self._is_anonymous(weight):
                name = self._folded_weight(weight) or bias or _scope_name(node)
            else:  # a layer of this name would hold it transposed
                name = weight if bias == weight and not as_stored else None
            if name is not None:
                self._find(weight, name, _as_it_is if as_stored else _transposed)

    def _folded_weight(self, constant: str) -> str | None:
        """The weight that the dynamo exporter transposed, and changed in no other way, to get a constant."""
        sources = self.folded.get(constant, [])
        return sources[0] if len(sources) == 1 and sources[0].endswith("weight") else None

    def _bias_name(self, node: Any, size: int) -> str | None:
        """`X.weight` where `X.bias` is added, `X.in_proj_weight` for `X.in_proj_bias`."""
        added = node.input[2:3]
        if node.op_type == "MatMul":
            adds = [user for output in node.output for user in self.users[output] if user.op_type == "Add"]
            added = [value for add in adds for value in add.input]
        names = {value for value in added if value in self.constants and value.endswith("bias")}
        if len(names) != 1 or self._dims(name := names.pop()) != [size] or self._is_anonymous(name):
            return None
        return name.removesuffix("bias") + "weight"

    # -- Embeddings ----------------------------------------------------------------------------------------------------

    def _find_tokens(self) -> None:
        """Name the constants that a class token, or another token before the patches, was expanded to."""
        for node in self.nodes:
            if node.op_type != "Concat" or _attribute(node, "axis", 0) != 1:
                continue
            for value in node.input:
                sources = [name for name in self.folded.get(value, []) if not re.fullmatch(r"val_\d+", name)]
                if len(sources) == 1 and re.search("tokens?$", sources[0]) and self._is_repeated(value):
                    self._find(value, sources[0], _first)

    def _is_repeated(self, value: str) -> bool:
        """Whether a constant is [B, T, D] with the same values for each image."""
        if value not in self.constants or len(self.constants[value].dims) != 3:
            return False
        tensor = self._tensor(value)
        return torch.equal(tensor, tensor[:1].expand_as(tensor))

    def _find_positions(self) -> None:
        """Find position embeddings that are resized: cat(class token, patches) + cat(row, resize(grid))."""
        for node in self.nodes:
            if node.op_type != "Add" or len(node.input) != 2:
                continue
            for left, right in (node.input, node.input[::-1]):
                name = self._position_name(self._concatenated(left))
                parts = self._concatenated(right)
                if name is None or len(parts) != 2 or self._dims(parts[0])[:2] != [1, 1]:
                    continue
                row, (grid, restore) = parts[0], self._resized(parts[1])
                if restore is None or not self._is_anonymous(row) or not self._is_anonymous(grid):
                    continue
                if self.positions.setdefault(name, (row, grid, restore))[:2] != (row, grid):
                    raise CheckpointError(f"{self.path}: both {row} and {self.positions[name][0]} are part of {name}")

    def _dims(self, value: str) -> list[int]:
        """A constant's dimensions; [] for any other value."""
        return list(self.constants[value].dims) if value in self.constants else []

    def _concatenated(self, value: str) -> list[str]:
        """The parts that a value is concatenated from along the tokens; [] if it is not."""
        node = self.maker.get(value)
        if node is None or node.op_type != "Concat" or _attribute(node, "axis", 0) != 1:
            return []
        return list(node.input)

    def _position_name(self, tokens: list[str]) -> str | None:
        """transformers' or timm's name of the position embedding, depending on the class token's name."""
        for token in tokens[:1]:
            node = self.maker.get(token)
            if node is not None and node.op_type == "Expand" and node.input[:1]:
                token = node.input[0]
            scope, _, name = self.found[token][0].rpartition(".") if token in self.found else token.rpartition(".")
            if name == "cls_token" and token in self.constants:
                own = "position_embeddings" if scope.endswith("embeddings") else "pos_embed"
                return f"{scope}.{own}" if scope else own
        return None

    def _resized(self, value: str) -> tuple[str, Callable[[Tensor], Tensor] | None]:
        """The constant that a value is resized from, and how that becomes [1, N, D]; None if the way is unknown."""
        steps: list[str] = []
        for _ in range(12):  # more than are needed; a damaged graph may have circles
            node = self.maker.get(value)
            if node is None or not node.input:
                break
            if node.op_type == "Transpose":
                steps.insert(0, "Transpose" + "".join(map(str, _attribute(node, "perm", []))))
            elif node.op_type != "Cast":
                steps.insert(0, node.op_type)
            value = node.input[0]
        sides, restore = _GRIDS.get(" ".join(steps), (0, None))
        return value, restore if len(self._dims(value)) == sides else None

    # -- The result ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All weights that have a name."""
        tensors: dict[str, Tensor] = {}
        for constant in self.constants:
            if constant in self.found or not self._is_anonymous(constant):
                name, restore = self.found.get(constant, (constant, _as_it_is))
                self._add(tensors, name, constant, restore(self._tensor(constant)))
        for name, (row, grid, restore) in self.positions.items():
            first, rest = self._tensor(row), restore(self._tensor(grid))
            if first.shape[2:] != rest.shape[2:] or first.dtype != rest.dtype or len(rest) != 1:
                raise CheckpointError(f"{self.path}: {row} and {grid} do not make a position embedding")
            self._add(tensors, name, f"{row} with {grid}", torch.cat((first, rest), 1))
        return tensors

    def _add(self, tensors: dict[str, Tensor], name: str, constant: str, tensor: Tensor) -> None:
        if name in tensors and not torch.equal(tensors[name], tensor):
            raise CheckpointError(f"{self.path}: {constant} should be {name}, which is a constant with other values")
        tensors[name] = tensor

    def unnamed(self) -> dict[str, str]:
        """The constants that have no name in PyTorch or are not weights."""
        used = {constant for row, grid, _ in self.positions.values() for constant in (row, grid)} | self.found.keys()
        rest = [name for name in self.constants if self._is_anonymous(name) and name not in used]
        return {name: _describe(self.constants[name]) for name in rest}

    def _tensor(self, name: str) -> Tensor:
        """A constant's values, if it has as many bytes as its shape needs."""
        proto = self.constants[name]
        if proto.data_type not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name} has ONNX data type {proto.data_type}, which is unsupported")
        dtype, _, _ = _DTYPES[proto.data_type]
        shape = list(proto.dims)
        nbytes = -1 if any(side < 0 for side in shape) else math.prod(shape) * dtype.itemsize
        if nbytes == 0:  # and perhaps other sides too large for any memory
            raise CheckpointError(f"{self.path}: {name} has shape {shape}: it has no values")
        if self.beside.holds(proto):
            tensor = self.beside.read(proto, shape, dtype, nbytes)
        else:
            data = proto.raw_data if proto.HasField("raw_data") else self._packed(name, proto)
            if nbytes != len(data):
                raise CheckpointError(
                    f"{self.path}: {name} holds {len(data)} bytes, which does not fit {dtype} {shape}"
                )
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            tensor.reshape(-1).view(torch.uint8).numpy().data[:] = data
        if dtype == torch.bool and (largest := tensor.view(torch.uint8).max()) > 1:
            raise CheckpointError(f"{self.path}: {name} holds {largest}, expected 0 or 1")
        return tensor

    def _packed(self, name: str, proto: Any) -> bytes:
        """The bytes of values that are stored one by one in a field for the dtype."""
        _, field, stored = _DTYPES[proto.data_type]
        values = np.array(getattr(proto, field), dtype="<i8" if field.startswith("int") else stored)
        packed = values.astype(stored)
        if field.startswith("int") and (packed != values).any():
            raise CheckpointError(f"{self.path}: {name} holds values outside the range of its data type")
        return packed.tobytes()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


def _first(tensor: Tensor) -> Tensor:
    return tensor[:1].clone()


# The operations that resize a grid of positions -> the grid's number of dimensions, and how it becomes [1, N, D].
_GRIDS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Reshape Transpose0312 Resize Transpose0231 Reshape": (3, _as_it_is),
    "Transpose0312 Resize Transpose0231 Reshape": (4, lambda grid: grid.flatten(1, 2)),
    "Resize Transpose0231 Reshape": (4, lambda grid: grid.permute(0, 2, 3, 1).flatten(1, 2)),
}


def _folded(graph: Any) -> dict[str, list[str]]:
    """The constants that the dynamo exporter computed -> the names of everything they were computed from."""
    properties = ((value.name, entry) for value in graph.value_info for entry in value.metadata_props)
    return {name: re.findall(r"'([^']*)'", entry.value) for name, entry in properties if entry.key == _FOLDED}


def _attribute(node: Any, name: str, default: Any) -> Any:
    """A node's attribute, of the default's type: an int or a list of them."""
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) if isinstance(default, list) else attribute.i
    return default


def _scope_name(node: Any) -> str | None:
    """`blocks.0.attn.qkv.weight`, from the node's name `/blocks/blocks.0/attn/qkv/MatMul`."""
    scope, _, operation = node.name.rpartition("/")
    if operation != node.op_type or not scope.startswith("/"):
        return None
    parts = scope[1:].split("/")  # a Sequential precedes its children, whose parts repeat its own
    kept = [part for part, child in zip(parts, [*parts[1:], ""]) if not child.startswith(part + ".")]
    name = ".".join([*kept, "weight"])
    return name if re.fullmatch(r"\w+(\.\w+)+", name) else None


def _describe(proto: Any) -> str:
    dtype = str(_DTYPES[proto.data_type][0]).removeprefix("torch.") if proto.data_type in _DTYPES else "other"
    return f"{dtype} {list(proto.dims)}" if "float" in dtype or dtype == "other" else f"{dtype} constant"
