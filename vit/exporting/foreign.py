"""Files that other tools exported, run with what their user says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vit.metadata import Preprocessing

from .metadata import Metadata
from .packages import need
from .read import ExportedModel, provenance
from .runtimes import Port, Session, open_file


@dataclass(frozen=True)
class ForeignConfig:
    """What a graph shows of its model. It has no field for what a graph does not show, such as the patches' number."""

    in_chans: int
    num_classes: int = 0  # 0: its output are features
    embed_dim: int = 0  # 0: its output are logits
    global_pool: str = "unknown"
    patch_size: int = 1  # sides are taken as its user says them

    def to_dict(self) -> dict[str, Any]:
        """As `ViTConfig.to_dict`."""
        return asdict(self)


class ForeignModel(ExportedModel):
    """A graph that `vit.export` did not write: float32 images [B, C, H, W] in, logits or features [B, N] out.

    Args:
        path: an `.onnx` file, or the `.xml` of OpenVINO with its `.bin` beside it.
        runtime: "onnxruntime" or "openvino".
        preprocessing: how its images are prepared; a graph does not say it. Its size is set to the first of `sizes`.
        sizes: (H, W) that are going to be used, each of which is tried on zeros. None for the one that the graph fixes.
        output: "logits" or "features": what is wanted, from the output of that name, or the only one that is [B, N].
            Logits that are probabilities already become their logarithms, whose softmax they are.
        threads: of the runtime; None for as many as PyTorch uses now.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that the runtime cannot open, a graph with other inputs or outputs, no size, or one that
            the graph does not take.
    """

    def __init__(
        self,
        path: Path,
        runtime: str,
        preprocessing: dict[str, Any],
        sizes: Sequence[tuple[int, int]] = (),
        output: str = "logits",
        threads: int | None = None,
    ) -> None:
        self.path, self.session = path, open_file(path, threads, runtime)
        batch, channels, *sides = only_input(path, self.session).shape
        if not sizes and None in sides:
            raise ValueError(f"{path} takes images of more than one size: say --img-size")
        channels = channels or len(preprocessing.get("mean", (0, 0, 0)))
        if (n := len(preprocessing.get("mean", (0,) * channels))) != channels:
            raise ValueError(f"{path} takes {channels} channels, and --mean has {n} numbers: give one for each")
        sizes = list(sizes) or [(sides[0] or 0, sides[1] or 0)]
        for size in sizes:
            if any(side not in (None, asked) for side, asked in zip(sides, size)):
                raise ValueError(f"{path} takes images of {_sides(sides)}, not {_sides(size)}")
            found = try_size(path, self.session, (batch or 2, channels, *size))
        self.index = choose(path, self.session.outputs, found, output)
        width = found[self.index].shape[1]
        classes, features = (width, 0) if output == "logits" else (0, width)
        config: Any = ForeignConfig(channels, classes, features)
        self.config, self.categories, self.input, self.dtype = config, None, "float32", torch.float32
        self.preprocessing = Preprocessing(**preprocessing, size=sizes[0])
        self.provenance = replace(provenance(path, None), sha256=digest(path))
        self.metadata = Metadata(
            config=config, preprocessing=self.preprocessing, categories=None, outputs=(output,), precision="unknown",
            input="float32", size=None if None in sides else sizes[0], batch=batch, source=None, versions={},
            processor="unknown", parity=None,
        )  # fmt: skip

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        """As `ExportedModel.compute`: the one output that was chosen, in float32."""
        values = self.session.run(images)[self.index].astype(np.float32)
        if self.config.num_classes > 1 and (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3):
            with np.errstate(divide="ignore"):
                values = np.log(values)  # ultralytics exports the softmax, too
        return [values]


def digest(path: Path) -> str:
    """SHA-256 of a file and of those beside it that hold its weights: the same graph may come with others."""
    whole = hashlib.sha256()
    for file in (path, *weights_of(path)):
        whole.update(file.read_bytes())
    return whole.hexdigest()


def weights_of(path: Path) -> list[Path]:
    """The files beside an `.xml` or `.onnx` file that hold its weights; none if it holds them itself."""
    if path.suffix == ".xml":
        return [path.with_suffix(".bin")]
    model = need("onnx", "onnx").load(path, load_external_data=False)
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return [path.parent / name for name in sorted({entry.value for entry in entries if entry.key == "location"})]


def only_input(path: Path, session: Session) -> Port:
    """The input of a graph; ValueError unless it is the only one and takes float32 images [B, C, H, W]."""
    if len(session.inputs) != 1 or session.inputs[0].dtype != "float32" or len(session.inputs[0].shape) != 4:
        raise ValueError(f"{path} must have one input, float32 [B, C, H, W]; it has {_listed(session.inputs)}")
    _, channels, _, last = session.inputs[0].shape
    if last in (1, 3) and channels not in (1, 3):
        raise ValueError(f"{path} takes channels last, {_listed(session.inputs)}: export it for [B, C, H, W]")
    return session.inputs[0]


def try_size(path: Path, session: Session, shape: tuple[int, ...]) -> list[np.ndarray]:
    """What a graph returns for zeros: its own words on the shapes of its outputs may be vague."""
    try:
        return session.run(np.zeros(shape, np.float32))
    except Exception as error:  # each runtime has its own classes
        why = " ".join(str(error).split())
        raise ValueError(f"{session.name} cannot run {path} on images {list(shape)}: {why}") from error


def choose(path: Path, ports: Sequence[Port], arrays: Sequence[np.ndarray], wanted: str) -> int:
    """Which output is wanted: the one that is named so, or else the only one that is [B, N] numbers."""
    flat = [i for i, array in enumerate(arrays) if array.ndim == 2 and array.dtype.kind == "f"]
    if len(found := [i for i in flat if ports[i].name == wanted] or flat) == 1:
        return found[0]
    has = ", ".join(f"{port.name} {array.dtype} {list(array.shape)}" for port, array in zip(ports, arrays))
    raise ValueError(f"{path} must have one output [B, N], or one named {wanted}; for these images it gives {has}")


def _listed(ports: Sequence[Port]) -> str:
    return ", ".join(f"{port.name} {port.dtype} [{_sides(port.shape, ', ')}]" for port in ports)


def _sides(sides: Sequence[int | None], between: str = " x ") -> str:
    return between.join(str(side or "any") for side in sides)
