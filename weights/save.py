"""A model to a file."""

from __future__ import annotations

from pathlib import Path

from vit.model import ViT

from .convert import convert
from .files import write_checkpoint
from .layouts import get_layout
from .own import check_settings, write_header
from .timm import write_config


def save_checkpoint(model: ViT, path: str | Path, layout: str = "vit") -> Path:
    """Write a model's weights, with all that `load_pretrained` needs to bring back the same model.

    Args:
        model: the model, on any device and in any floating dtype; both its weights and dtype are kept to the bit.
        path: a `.safetensors` file, or a folder in which `model.safetensors` is written; "timm" takes a folder only,
            since its `config.json` speaks for all that lies beside it.
        layout: "vit" puts config, preprocessing, categories and provenance into the file's header; "timm" writes
            timm's names and the `config.json` from which timm loads them.

    Returns:
        The file that was written.

    Raises:
        ValueError: an unknown layout, a path with another ending, weights that are not finite, settings that
            contradict each other or that the layout cannot hold. Nothing is written then; a file that was there is
            replaced only by a whole one.
    """
    if not isinstance(model, ViT):
        raise ValueError(f"expected a vit.ViT, not {type(model).__name__}: save a model as it was before compiling")
    file = target_files(path, layout)[0]
    check_settings(model)
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
    is_file = path.suffix == ".safetensors" and not path.is_dir()
    if layout == "timm" and is_file:
        raise ValueError(f"{path} must be a folder: the timm layout is model.safetensors with a config.json beside it")
    file = path if is_file else path / "model.safetensors"
    return [file, file.parent / "config.json"] if layout == "timm" else [file]
