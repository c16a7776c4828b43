"""Optional packages, imported when they are used."""

from importlib import import_module
from typing import Any


def need(package: str, extra: str) -> Any:
    """Import an optional package; ValueError with the line that installs it."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {package} is missing: pip install 'vit-small[{extra}]'") from error
