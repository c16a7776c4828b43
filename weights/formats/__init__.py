"""File formats: from a path to the tensors in it. No code in a file is ever run."""

from collections.abc import Callable
from pathlib import Path

from ..checkpoint import Checkpoint, CheckpointError
from ..content import describe, mistaken, recognise, unfinished
from .npz import read_npz
from .onnx import read_onnx
from .pickled import read_pickled
from .safetensors import read_safetensors, read_sharded

READERS: dict[str, Callable[[Path], Checkpoint]] = {
    ".safetensors": read_safetensors,
    ".index.json": read_sharded,
    ".npz": read_npz,
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".pth.tar"), read_pickled),
    ".onnx": read_onnx,
}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of any known format, which is chosen by the ending of its name.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: another ending, or a file that is not of the format that its ending names.
    """
    for ending, read in READERS.items():
        if path.name.lower().endswith(ending):
            if text := mistaken(path, ending):
                raise CheckpointError(text)
            return read(path)
    if unfinished(path):
        raise CheckpointError(f"{path} is an unfinished download: start it again, or remove the ending if it is whole")
    raise CheckpointError(f"{path} must end in one of {', '.join(READERS)}; it is {describe(recognise(path))}")
