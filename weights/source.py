"""From a name, a file or a folder to the files of a checkpoint, downloaded if necessary."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vit.checks import unknown, warn
from vit.presets import NAMED_MODELS, list_models
from vit.resources import bundled_checkpoint

from .hub import FILE_SUFFIXES, download, parse_name

# The weights in a folder; the first of these that exists is read.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
BEST = "model_best.safetensors"  # beside the last weights, in the folder of a training run


@dataclass(frozen=True)
class Source:
    """The files of a checkpoint, and what is known of them."""

    name: str  # for the provenance
    weights: Path
    config: Path | None = None  # a config.json beside it
    preprocessor: Path | None = None  # a preprocessor_config.json of transformers beside it
    commit: str | None = None
    sha256: str | None = None  # what the Hub says it is
    license: str | None = None  # if it is known without the file


def find(source: str | Path, revision: str | None = None) -> Source:
    """The files behind a name or path.

    Raises:
        FileNotFoundError, HubError: no such file, or none that can be downloaded.
        ValueError: not a name; a revision of something that is not on the Hub.
    """
    # None and "" come from unset environment variables; as a path, "" would be the current folder
    if not isinstance(source, (str, os.PathLike)) or source == "":
        raise ValueError(f"expected the name of a model, a file or a folder, got {source!r}")
    path, name = Path(source), str(source)
    if revision is not None and (path.exists() or bundled_checkpoint(name)):
        raise ValueError(f"revision={revision!r} is for repositories on the Hub, but {name} is a local file or folder")
    if path.is_dir():
        return _in_folder(path, name)
    if path.is_file():
        return _with_configs(name, path)
    if path.is_symlink():
        annex = "; run `git annex get` on it" if ".git/annex" in os.readlink(path) else ""
        raise FileNotFoundError(f"{name} is a link to {os.readlink(path)}, which does not exist{annex}")
    if bundled := bundled_checkpoint(name):
        return _in_folder(bundled, name)
    if name in NAMED_MODELS:
        name = f"{name}.{NAMED_MODELS[name].tag}"
    if (parsed := parse_name(name)) is None:
        if path.suffix in FILE_SUFFIXES or name.endswith(("/", os.sep)):
            raise FileNotFoundError(f"{name} does not exist")
        if len(path.parts) > 1:
            raise FileNotFoundError(f"{name} does not exist (a repository on the Hub is written hf-hub:{name})")
        names = unknown("model", name, list_models(pretrained=True))
        raise ValueError(f"{names} There is no file or folder named {name!r} either.")
    repo, asked = parsed
    if revision is not None and asked is not None:
        raise ValueError(f"{name} already contains a revision, so revision={revision!r} cannot be used with it")
    files = download(repo, asked if revision is None else revision)
    license = "apache-2.0" if name in list_models(pretrained=True) else None  # as timm's own table says
    return Source(
        f"hf-hub:{repo}", files.weights, files.config, files.preprocessor, files.commit, files.sha256, license
    )


def _in_folder(folder: Path, name: str) -> Source:
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            if (folder / BEST).is_file():
                warn(f"{name} holds the last weights, which are read; for the best, name {folder / BEST}")
            return _with_configs(name, folder / file)
    raise FileNotFoundError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}; {_instead(folder)}")


# Files by which a folder tells what wrote it, and what to do.
_FOLDERS = {
    ".metadata": "it is a distributed checkpoint: run "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pth`",
    "data.pkl": "it is an unpacked file of torch.save: pack it again, or get the file itself",
    "saved_model.pb": "it is a TensorFlow model: save its weights as safetensors",
}


def _instead(folder: Path) -> str:
    """What to load instead of a folder without the usual names."""
    for file, advice in _FOLDERS.items():
        if (folder / file).is_file():
            return advice
    files = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in FILE_SUFFIXES - {".json"})
    return f"name one of its files: {', '.join(files[:5])}" if files else "name a file, or another folder"


def _with_configs(name: str, weights: Path) -> Source:
    if weights.suffix.lower() == ".npz":  # Google's files have no config.json; one beside them is another model's
        return Source(name, weights)
    config, preprocessor = (weights.parent / file for file in ("config.json", "preprocessor_config.json"))
    return Source(name, weights, config if config.is_file() else None, preprocessor if preprocessor.is_file() else None)
