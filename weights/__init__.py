"""Checkpoints in and out: files, key maps, the Hub."""

from .checkpoint import CheckpointError
from .convert import Converted, Report, convert
from .detect import detect_layout
from .hub import HubError
from .layouts import LAYOUTS
from .load import load_pretrained
from .save import save_checkpoint

__all__ = [
    "LAYOUTS", "CheckpointError", "Converted", "HubError", "Report", "convert", "detect_layout", "load_pretrained",
    "save_checkpoint",
]  # fmt: skip
