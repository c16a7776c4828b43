"""Optional packages, imported when they are used."""

import re
from importlib import import_module
from importlib.metadata import requires
from typing import Any


def need(package: str, extra: str, note: str = "") -> Any:
    """Import an optional package; ValueError with the line that installs it, or a note on how to."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        wanted = [line for line in requires("vit-small") or [] if f'extra == "{extra}"' in line]
        names = [re.split(r"[ ;<>=!~]", line)[0] for line in wanted] or [package.partition(".")[0]]
        how = note or f"pip install {' '.join(names)}"
        raise ValueError(f"the package {package} is missing: {how}") from error
