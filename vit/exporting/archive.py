"""Metadata in a zip archive: the one that a file is, or one behind its end, where runtimes do not look."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

ENTRY = "vit.json"


def add(path: Path, strings: dict[str, str], folder: str = "") -> None:
    """Append metadata to a file, in a folder of the archive."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(f"{folder}{ENTRY}"), json.dumps(strings, indent=1))  # without the time


def read(path: Path) -> dict[str, str]:
    """The metadata of a file.

    Raises:
        ValueError: there are none, as in a file that is cut short, or they cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.rpartition("/")[2] == ENTRY)
            content = json.loads(archive.read(name))
            return {str(key): str(value) for key, value in content.items()}
    except StopIteration:
        raise ValueError(f"{path} cannot be used: it has no metadata of `vit export`") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, AttributeError) as error:  # its own
        raise ValueError(f"{path} is cut short, damaged, or not a file of `vit export`: {error}") from error
