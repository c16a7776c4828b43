"""The files that `vit features` writes: their names, their metadata, and what a later run may resume."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vit.files import replacing, write_json

INDEX_START = b'{\n  "shards": ['  # as `write_index` writes it


def name_files(output: Path, count: int, per_file: int) -> dict[Path, range]:
    """The files to write, each with the numbers of its images: one file, or features-00001-of-00003.safetensors etc."""
    parts = [range(start, min(start + per_file, count)) for start in range(0, count, per_file)]
    if len(parts) == 1:
        return {output: parts[0]}
    names = (f"{output.stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1))
    return {output.with_name(name): part for name, part in zip(names, parts)}


def check_files(output: Path, files: Mapping[Path, range], settings: Mapping[str, str], paths: Sequence[Path]) -> None:
    """Check all files that exist already, before anything is computed: each must be what this run would write.

    Raises:
        ValueError: a file of another run, of other or changed images, or of another program.
    """
    check_others(output, files)
    for file, numbers in files.items():
        if file.exists():
            check_file(file, settings, [paths[i] for i in numbers])


def check_others(output: Path, files: Iterable[Path]) -> None:
    """Refuse features of other runs under `output`'s name.

    Another list of images, or another --shard, gives files of other names: both sets side by side would be read as one.
    """
    index = index_of(output)
    if index.exists() and not index.read_bytes().startswith(INDEX_START):
        raise ValueError(f"{index} exists and is not an index of features: choose another --output")
    beside = output.parent.iterdir() if output.parent.exists() else ()
    shard = re.compile(re.escape(output.stem) + r"-\d{5}-of-\d{5}\.safetensors")
    others = [path for path in beside if (shard.fullmatch(path.name) or path == output) and path not in files]
    if others:
        raise ValueError(
            f"{min(others)} exists and belongs to another list of images or another --shard: remove that run's files,"
            " or choose another --output"
        )


def check_file(file: Path, settings: Mapping[str, str], paths: Sequence[Path]) -> None:
    """Refuse an existing file with other settings or other images than this run's."""
    found = read_metadata(file)
    for name, value in settings.items():
        if str(found.get(name)) != value:  # files from before --optimize existed have no such entry
            raise ValueError(
                f"{file} exists, and its {name} is {found.get(name)}, not {value}: remove it, or choose another"
                " --output"
            )
    before, now = json.loads(found["images"]), [state(path) for path in paths]
    if [one[0] for one in before] != [one[0] for one in now]:
        raise ValueError(f"{file} exists and holds other images: remove it, or choose another --output")
    if before != now:
        changed = next(new[0] for old, new in zip(before, now) if old != new)
        raise ValueError(f"{file} exists, and {changed} has changed since: remove the file to compute it again")


def state(path: Path) -> list[Any]:
    """What tells whether an image has changed since an earlier run: its path, size in bytes and modification time."""
    try:
        facts = path.stat()
    except OSError:
        return [str(path), None, None]
    return [str(path), facts.st_size, facts.st_mtime_ns]


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; ValueError if it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} exists and is not a safetensors file: {error}") from None


def write_file(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all; first remove what killed runs have left of it."""
    from vit.weights.formats.safetensors import write_safetensors

    for path in file.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(file.name)}\.[0-9a-f]{{8}}", path.name):  # the temporary names of `replacing`
            path.unlink(missing_ok=True)
    with replacing(file) as temporary:
        write_safetensors(temporary, tensors, metadata)


def index_of(output: Path) -> Path:
    """The index of several files: <output>.index.json."""
    return output.with_name(f"{output.name}.index.json")


def write_index(output: Path, files: Iterable[Path]) -> None:
    """List the files and their images, once all files exist."""
    shards = [{"file": file.name, "paths": json.loads(read_metadata(file)["paths"])} for file in files]
    with replacing(index_of(output)) as temporary:
        write_json(temporary, {"shards": shards})
