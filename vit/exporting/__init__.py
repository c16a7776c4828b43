"""Exported models: one file for another runtime, which holds its preprocessing, its labels and its proof."""

from .formats import FORMATS
from .gate import ParityError
from .metadata import Metadata
from .read import ExportedModel, load_exported
from .write import Report, export

__all__ = ["FORMATS", "ExportedModel", "Metadata", "ParityError", "Report", "export", "load_exported"]
