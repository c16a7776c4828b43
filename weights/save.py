"""A model to a file."""

from __future__ import annotations

from pathlib import Path

from vit.model import ViT

from .convert import convert
from .files import write_checkpoint
from .layouts import get_layout
from .own import write_header
from .timm import write_config


def save_checkpoint(model: ViT, path: str | Path, layout: str = "vit") -> Path:
    """Write a model's weights, with all that `load_pretrained` needs to bring back the same model.

    Args:
        model: the model, on any device and in any floating dtype; both its weights and dtype are kept to the bit.
        path: a `.safetensors` file, or a folder in which `model.safetensors` is written.
        layout: "vit" puts config, preprocessing, categories and provenance into the file's header; "timm" writes
            timm's names and, beside the file, the `config.json` from which timm loads it.

    Returns:
        The file that was written.

    Raises:
        ValueError: an unknown layout, a path with another ending, or a setting that the layout cannot hold. Nothing
            is written then; a file that was there is replaced only by a whole one.
    """
    file = target_files(path, layout)[0]
    converted = convert(model.state_dict(), "vit", layout, model.config)
    config = write_config(model) if layout == "timm" else None
    header = write_header(model) if layout == "vit" else {"format": "pt"}
    write_checkpoint(file, converted.state_dict, header, config)
    return file


def target_files(path: str | Path, layout: str) -> list[Path]:
    """The files that `save_checkpoint` writes: the weights, then the `config.json` where the layout has one."""
    get_layout(layout)
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".npz", ".onnx", ".json") and not path.is_dir():
        raise ValueError(f"{path} must end in .safetensors or be a folder: other formats are not written")
    file = path if path.suffix == ".safetensors" and not path.is_dir() else path / "model.safetensors"
    return [file, file.parent / "config.json"] if layout == "timm" else [file]
