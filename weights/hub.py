"""Checkpoints from the Hugging Face Hub: from a name to two files in the local cache."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vit.presets import NAMED_MODELS

from .checkpoint import CheckpointError, joint_sha256, read_json

# Seconds until a silent Hub counts as unreachable. HF_HUB_ETAG_TIMEOUT, where it is set, takes precedence.
_TIMEOUT = 5

# endings by which a name is a file's, whether or not it is there
FILE_SUFFIXES = {".safetensors", ".npz", ".npy", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".json", ".tar", ".zip"}

_OTHERWISE = "pass a local file or folder instead, or run `vit demo`, which needs no network"


class HubError(OSError):
    """A download that failed, in one line: what was asked, why it failed, how to go on."""


@dataclass(frozen=True)
class HubFiles:
    """A checkpoint in huggingface_hub's cache. All files belong to one commit."""

    repo: str  # "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
    commit: str  # its full hash
    weights: Path  # a link to a blob: deleting a damaged download means deleting weights.resolve() as well
    config: Path
    preprocessor: Path | None  # transformers' preprocessor_config.json, where there is one
    sha256: str | None  # what the Hub says that the weights' sha256 is; None where it does not say


def parse_name(name: str) -> tuple[str, str | None] | None:
    """Which repository a name means.

    Args:
        name: "hf-hub:organization/name" (or "hf_hub:"), with "@revision" after it or not, or one of timm's names
            with its tag, such as "vit_small_patch16_224.augreg_in21k_ft_in1k".

    Returns:
        The repository and the revision (None: the newest), or None where the name means none: it may be a path.
        Nothing is said about whether the repository exists.
    """
    for prefix in ("hf-hub:", "hf_hub:"):
        if name.startswith(prefix):
            repo, at, revision = name.removeprefix(prefix).partition("@")
            return repo, revision if at else None
    architecture, _, tag = name.partition(".")
    # "vit_small_patch16_224.safetensors" is a file that does not exist, not a tag
    if architecture in NAMED_MODELS and tag and "/" not in tag and Path(name).suffix not in FILE_SUFFIXES:
        return f"timm/{name}", None
    return None


def download(
    repo: str, revision: str | None = None, *, endpoint: str | None = None, cache_dir: Path | None = None
) -> HubFiles:
    """Fetch a repository's config.json and weights, or find them in the cache.

    The weights are model.safetensors; in transformers' repositories else the files that model.safetensors.index.json
    names, or else pytorch_model.bin.
    What is in the cache is not downloaded again, and serves where the Hub cannot be reached or HF_HUB_OFFLINE is set.
    A download that breaks off goes on from there. The weights' bytes are not checked here: compare their sha256.

    Args:
        repo: "organization/name".
        revision: a branch, a tag or a full commit hash; None is the newest commit.
        endpoint: the Hub's address; None is HF_ENDPOINT or https://huggingface.co.
        cache_dir: None is HF_HUB_CACHE or ~/.cache/huggingface/hub.

    Raises:
        HubError: a file is neither in the cache nor to be had from the Hub.
    """
    config = _fetch(repo, "config.json", revision, endpoint, cache_dir)
    commit = config.parent.name  # .../snapshots/<commit>/config.json
    # by commit: a branch may move between the requests
    where = (commit, endpoint, cache_dir)
    transformers = _is_transformers(config)
    preprocessor = _fetch_if_there(repo, "preprocessor_config.json", *where) if transformers else None
    weights = _fetch_if_there(repo, "model.safetensors", *where) if transformers else None
    if weights is None and transformers:
        index = _fetch_if_there(repo, "model.safetensors.index.json", *where)
        if index is not None:
            promises = [_promised_sha256(_fetch(repo, shard, *where)) for shard in _shards(index)]
            return HubFiles(repo, commit, index, config, preprocessor, _joint_sha256(promises))
        weights = _fetch_if_there(repo, "pytorch_model.bin", *where)
    if weights is None:
        weights = _fetch(repo, "model.safetensors", *where)
    return HubFiles(repo, commit, weights, config, preprocessor, _promised_sha256(weights))


def _is_transformers(config: Path) -> bool:
    try:
        return "model_type" in read_json(config)
    except CheckpointError:
        return False  # what is wrong with it is said when it is read for its content


def _shards(index: Path) -> list[str]:
    """The files that an index names; what they are worth is checked when they are read."""
    files = read_json(index).get("weight_map")
    names = set(files.values()) if isinstance(files, dict) and all(map(_is_name, files.values())) else set()
    return sorted(names)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _fetch_if_there(
    repo: str, file: str, revision: str | None, endpoint: str | None, cache_dir: Path | None
) -> Path | None:
    """As `_fetch`, but None where the repository has no such file."""
    from huggingface_hub import errors, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision)
    if cached is not None and not isinstance(cached, str):
        return None  # huggingface_hub remembers that it is not there
    try:
        return _fetch(repo, file, revision, endpoint, cache_dir)
    except HubError as error:
        cause = error.__cause__
        if isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError):
            return None
        raise


def _fetch(repo: str, file: str, revision: str | None, endpoint: str | None, cache_dir: Path | None) -> Path:
    """The path of one file in the cache, after a download where that is needed.

    huggingface_hub falls back to its cache after one failed request, but retries for 24 seconds where the cache has
    nothing. One request of our own, which is not retried, asks first in that case.
    """
    # here, because it takes a while, and most ways into this package never need it
    from huggingface_hub import (
        constants,
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    if timeout == constants.DEFAULT_ETAG_TIMEOUT:  # nobody set it
        timeout = _TIMEOUT
    try:
        if revision == "":
            raise ValueError("the revision after '@' is empty")
        if not isinstance(try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision), str):
            with suppress(errors.EntryNotFoundError):  # hf_hub_download will say so, too, and remember it
                get_hf_file_metadata(hf_hub_url(repo, file, revision=revision, endpoint=endpoint), timeout=timeout)
        path = hf_hub_download(
            repo, file, revision=revision, endpoint=endpoint, cache_dir=cache_dir, etag_timeout=timeout
        )
    except Exception as error:  # the HTTP client's own errors pass through, and the client differs between versions
        asked = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
        why = _explain(error, repo, revision, (endpoint or constants.ENDPOINT).rstrip("/"))
        raise HubError(" ".join(f"cannot get {file} of {asked}: {why}".split())) from error
    return Path(path)


def _explain(error: BaseException, repo: str, revision: str | None, endpoint: str) -> str:
    """Why `_fetch` failed, and how to go on."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # "not in the cache": its cause says why the Hub did not help
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = re.split(r"\.?(?:\s*\n|\. |$)", str(error))[0] or type(error).__name__  # its first sentence

    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"it is not in the cache, and HF_HUB_OFFLINE is set; unset that, {_OTHERWISE}"
    if isinstance(error, ValueError) and status is None:  # huggingface_hub's checks of names
        return f"{detail}; write hf-hub:organization/name or hf-hub:organization/name@revision"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {revision!r}; choose one from {endpoint}/{repo}/commits/main, or leave it out"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"the repository has no such file; look for another at {endpoint}/{repo}/tree/main, {_OTHERWISE}"
    if status in (401, 403, 404):
        return (
            f"the Hub answers {status}, which means that there is no such repository, or that it is private or gated; "
            f"check the name at {endpoint}/{repo}, and accept its terms there or run `hf auth login` where it has any"
        )
    if status is not None:
        return f"the Hub at {endpoint} answers {status}; try again in a few minutes, {_OTHERWISE}"
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"the cache cannot be written ({detail}); free some space, or let HF_HUB_CACHE name another folder"
    if isinstance(error, errors.FileMetadataError):
        return f"{endpoint} does not answer like a Hub ({detail}); check HF_ENDPOINT and the proxy, {_OTHERWISE}"
    if "Consistency check failed" in str(error):
        return f"the download has the wrong size ({detail}); try again, {_OTHERWISE}"
    return f"the connection to {endpoint} failed ({detail}), and it is not in the cache; try again, {_OTHERWISE}"


def _promised_sha256(weights: Path) -> str | None:
    """The sha256 that the Hub gave for a file in the cache: the name of the blob that its link points to.

    None for a file that is no link (Windows) and for a small file, which git stores under another hash.
    """
    if not weights.is_symlink():
        return None
    # One step, not resolve(): the blob may be a link itself, to a store where files go by xet's hash, of equal length.
    blob = Path(os.readlink(weights)).name
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else None


def _joint_sha256(promises: list[str | None]) -> str | None:
    """What several files have together, as `Checkpoint.sha256` defines it; None where one of them is not known."""
    known = [promise for promise in promises if promise is not None]
    return joint_sha256(known) if known and len(known) == len(promises) else None
