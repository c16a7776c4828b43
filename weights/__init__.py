"""Checkpoints in and out: files, key maps, the Hub."""

from .convert import Converted, Report, convert
from .files import CheckpointError
from .hub import HubError
from .layouts import LAYOUTS, detect_layout
from .load import load_pretrained
from .save import save_checkpoint

__all__ = [
    "LAYOUTS", "CheckpointError", "Converted", "HubError", "Report", "convert", "detect_layout", "load_pretrained",
    "save_checkpoint",
]  # fmt: skip
