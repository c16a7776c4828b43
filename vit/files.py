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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
