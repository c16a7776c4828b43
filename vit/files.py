"""Writing a file whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class replacing:
    """A temporary path beside `path`. It takes the name of `path` when the block succeeds and is removed otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))  # keep a symbolic link, replace its target
        self.temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path) -> None:
    """Give the folder `new` the name `path`. What has that name is kept beside `new`, and comes back on an error."""
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise


def check_place(path: Path) -> None:
    """An error, before any work, if a file or folder cannot be written beside `path` and then get its name."""
    parent = next(one for one in path.parents if one.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file, so {path} cannot be written in it: give another place")
    for folder in (parent, path) if path.is_dir() else (parent,):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written to, so {path} cannot get its name: give another place")
    if os.path.ismount(path):
        raise ValueError(f"{path} is a mount point, which cannot be replaced: give another name, and copy it then")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
