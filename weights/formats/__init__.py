"""File formats: from a path to the tensors in it. Nothing is unpickled beyond what `weights_only=True` allows."""

from collections.abc import Callable
from pathlib import Path

from ..checkpoint import Checkpoint, CheckpointError
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
    """Read a file of any known format; the ending of its name tells which.

    Raises:
        FileNotFoundError, IsADirectoryError: as they say.
        CheckpointError: another ending, or a file that is not what its ending says.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    for ending, read in READERS.items():
        if path.name.lower().endswith(ending):
            return read(path)
    raise CheckpointError(f"{path} must end in one of {', '.join(READERS)}")
