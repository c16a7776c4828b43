"""Exported files, opened and called like the model that they were made of."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit.checks import require_int, unknown, warn
from vit.metadata import Provenance

from . import archive
from .metadata import PAGE, Metadata, processor
from .pixels import INPUTS, check_picture
from .runtimes import UNSAFE, Port, open_file
from .to_transformersjs import graph_in


def load_exported(
    path: str | Path, threads: int | None = None, runtime: str | None = None, trust: bool = False
) -> ExportedModel:
    """Open a file that `vit.export` wrote, in a runtime. Nothing is unpickled without `trust`.

    Args:
        path: a `.onnx` file, the `.xml` of OpenVINO with its `.bin` beside it, a `.pt2` file, or a folder for
            transformers.js, whose graph runs here in ONNX Runtime.
        threads: of the runtime; None for as many as PyTorch uses now.
        runtime: "onnxruntime" or "openvino", which reads both formats; None for the format's own.
        trust: open files that can run code while they are opened, as any `.pt2` can: PyTorch unpickles some parts of
            it and evaluates others, and one made with `aot` is native code.

    Returns:
        A model that is called as the original is: images in, logits out. It takes the sizes that it was exported for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, a damaged one, one without the metadata of `vit.export`, or one whose
            metadata contradict its graph; a runtime that does not read it, or whose package is missing; a `.pt2` file
            without `trust`.
    """
    if threads is not None:
        require_int("threads", threads, 1)
    model = ExportedModel(Path(path), threads, runtime, trust)
    if model.metadata.parity is None:
        warn(f"{path} was exported without a check against its model")
    if overflows(model):
        warn(
            f"{path} was checked on a processor with VNNI; on this one, without it, sums of bytes may overflow: export"
            " it here, where the check shows that, or with reduce_range=True (--reduce-range)"
        )
    return model


def overflows(model: ExportedModel) -> bool:
    """Whether sums of bytes that were right where a file was checked may overflow on this processor."""
    made = model.metadata
    whole = made.precision == "int8" and not made.reduce_range and model.session.name in ("onnxruntime", "openvino")
    return whole and "VNNI" in made.processor and "VNNI" not in processor()


def read_metadata(path: Path) -> Metadata:
    """What a file says of itself; no code of the file runs. Errors as of `load_exported`."""
    if path.suffix not in UNSAFE:
        return load_exported(path).metadata
    strings = archive.read(path)
    try:
        return Metadata.from_strings(strings)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


class ExportedModel:
    """A model in the runtime of an exported file.

    It has the `config`, `preprocessing`, `categories` and `provenance` of a `ViT`, so that `vit.create_transform` and
    the commands take it; `metadata` is all that the file says of itself.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, threads: int | None = None, runtime: str | None = None, trust: bool = False) -> None:
        self.path, self.session = path, open_file(path, threads, runtime, trust)
        try:
            self.metadata = Metadata.from_strings(self.session.metadata)
            check(self.metadata, self.session.inputs, self.session.outputs)
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
        self.config, self.categories = self.metadata.config, self.metadata.categories
        self.preprocessing, self.input = self.metadata.preprocessing, self.metadata.input
        self.dtype = torch.float32 if self.input == "float32" else torch.uint8  # of images
        self.provenance = provenance(path, self.metadata.source)

    def with_threads(self, threads: int) -> ExportedModel:
        """The same file, opened with another number of threads."""
        other = copy.copy(self)
        other.session = open_file(self.path, threads, self.session.name, trust=True)
        return other

    def __call__(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] images, normalised as `preprocessing` says -> [B, num_classes] logits.

        Of a model without a head, [B, D] features, as the model itself returns them. Files that were exported with
        `input` "uint8" or "image" take pixels instead, uint8 [B, H, W, in_chans]; `vit.create_transform` of this model
        makes the one or the other.

        Raises:
            ValueError: images of another kind or size, or a file that holds no logits.
        """
        name = "logits" if self.config.num_classes else "features"
        self.require(name)
        return self.run(images)[name]

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """The same images -> all outputs of the file, by name: "logits", "features", "attention".

        A file for one batch size is called as often as needed, the last time with zeros in place of missing images.
        """
        images = self.accept(images)
        batch = self.metadata.batch or len(images)
        missing = -len(images) % batch
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        parts = [self.compute(part.numpy()) for part in images.contiguous().split(batch)]
        joined = (torch.cat([torch.from_numpy(array) for array in arrays]) for arrays in zip(*parts))
        kept = (output[: len(images) - missing] for output in joined)
        return dict(zip(self.metadata.outputs, kept))

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        """One call of the runtime: images as the graph takes them -> its outputs, in the order of the metadata's."""
        return self.session.run(images)

    def require(self, output: str) -> None:
        """ValueError if the file does not give an output; the message says how to get it."""
        outputs = self.metadata.outputs
        if output not in outputs:
            names = ",".join([*outputs, output])
            raise ValueError(f"{self.path} gives {', '.join(outputs)}, not {output}: export it with --outputs {names}")

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """As `ViT.grid_of`."""
        p = self.config.patch_size
        H, W = self.preprocessing.size if self.input == "image" else sides(images, self.input)
        return H // p, W // p

    def forward_packed(self, images: Sequence[Tensor]) -> Tensor:
        """Images of any sizes that the file takes, each as in a batch, one after the other -> [images, num_classes]."""
        return torch.cat([self(image[None]) for image in images])

    def accept(self, images: Tensor) -> Tensor:
        """Check images: a runtime takes some wrong ones in silence. ONNX Runtime drops rows beyond whole patches."""
        C, p, size = self.config.in_chans, self.config.patch_size, self.metadata.size
        H, W = size or ("H", "W")
        shape = f"[B, {C}, {H}, {W}] images" if self.input == "float32" else f"[B, {H}, {W}, {C}] pixels"
        expected = f"{self.path} expects {shape} in {str(self.dtype).removeprefix('torch.')} on the CPU"
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"{expected}; got {found}")
        if images.dtype != self.dtype or images.device != self.device:
            raise ValueError(f"{expected}; got {images.dtype} on {images.device}")
        H, W = sides(images, self.input)
        channels = images.shape[1 if self.input == "float32" else 3]
        if channels != C or 0 in images.shape or (size and size != (H, W)):
            raise ValueError(f"{expected}; got {list(images.shape)}")
        if self.input == "image":
            check_picture(self.preprocessing, H, W)
        elif H % p or W % p:
            raise ValueError(f"{expected}, H and W multiples of {p}; got {list(images.shape)}")
        return images.detach()

    def __repr__(self) -> str:
        size = "any size" if self.metadata.size is None else "{} x {}".format(*self.metadata.size)
        return f"ExportedModel({str(self.path)!r}, {', '.join(self.metadata.outputs)}, {size})"


def provenance(path: Path, parent: Provenance | None) -> Provenance:
    """Of a file that a runtime opened."""
    file = graph_in(path) if path.is_dir() else path
    return Provenance(str(path), hashlib.sha256(file.read_bytes()).hexdigest(), file.suffix[1:], parent=parent)


def sides(images: Tensor, kind: str) -> tuple[int, int]:
    """(H, W) of images as a file of this kind takes them."""
    H, W = images.shape[2:] if kind == "float32" else images.shape[1:3]
    return H, W


def check(metadata: Metadata, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """ValueError if a graph is not the one that its metadata describe."""
    config, size = metadata.config, metadata.size or (None, None)
    if metadata.input == PAGE:
        raise ValueError("it is the graph of a page, which also takes a size: open the page, or export to another file")
    if metadata.input not in INPUTS:
        raise ValueError(unknown("kind of input in its metadata", metadata.input, INPUTS))
    if metadata.categories is not None and len(metadata.categories) != config.num_classes:
        raise ValueError(f"its metadata have {len(metadata.categories)} categories for {config.num_classes} classes")
    p = config.patch_size
    width = config.embed_dim * (1 + (config.global_pool == "token_avg"))
    grid = [side and side // p for side in (metadata.preprocessing.size if metadata.input == "image" else size)]
    kind = "float32" if metadata.input == "float32" else "uint8"
    shapes = {
        "images": (metadata.batch, config.in_chans, *size)
        if kind == "float32"
        else (metadata.batch, *size, config.in_chans),
        "logits": (metadata.batch, config.num_classes),
        "features": (metadata.batch, width),
        "attention": (metadata.batch, config.num_heads, *grid),
    }
    wanted = [Port("images", kind, shapes["images"])]
    wanted += [Port(name, "float32", shapes[name]) for name in metadata.outputs]
    for found, expected in zip([*inputs, *outputs], wanted):
        if found != expected:
            raise ValueError(f"its metadata describe {_describe(expected)}, and its graph has {_describe(found)}")
    if len(inputs) != 1 or len(outputs) != len(metadata.outputs):
        names = ", ".join(port.name for port in (*inputs, *outputs))
        raise ValueError(f"its metadata describe images, {', '.join(metadata.outputs)}, and its graph has {names}")


def _describe(port: Port) -> str:
    return f"{port.name} {port.dtype} [{', '.join('any' if n is None else str(n) for n in port.shape)}]"
