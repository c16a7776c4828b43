"""Optional packages, imported when they are used."""

from importlib import import_module
from typing import Any


def need(package: str, extra: str, note: str = "") -> Any:
    """Import an optional package; ValueError with the line that installs it, or a note on how to."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        how = note or f"pip install 'vit-small[{extra}]'"
        raise ValueError(f"the package {package} is missing: {how}") from error
