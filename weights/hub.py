"""Checkpoints from the Hugging Face Hub: from a name to files in the local cache."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vit.presets import NAMED_MODELS

from .checkpoint import CheckpointError, joint_sha256, read_json

# Seconds until a silent Hub counts as unreachable. HF_HUB_ETAG_TIMEOUT takes precedence if it is set.
_TIMEOUT = 5

# Names with these endings are files, whether or not they exist.
FILE_SUFFIXES = {".safetensors", ".npz", ".npy", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".json", ".tar", ".zip"}

_OTHERWISE = "pass a local file or folder instead, or run `vit demo`, which needs no network"


class HubError(OSError):
    """A download that failed, in one line: what was asked, why it failed, what to do."""


@dataclass(frozen=True)
class HubFiles:
    """A checkpoint in huggingface_hub's cache. All files belong to one commit."""

    repo: str  # "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
    commit: str  # its full hash
    weights: Path  # a link to a blob: deleting a damaged download means deleting weights.resolve() as well
    config: Path
    preprocessor: Path | None  # transformers' preprocessor_config.json, if the repository has one
    sha256: str | None  # of the weights, as the Hub states it; None if it does not


def parse_name(name: str) -> tuple[str, str | None] | None:
    """The repository that a name means.

    Args:
        name: "hf-hub:organization/name" (or "hf_hub:"), optionally with "@revision", or one of timm's names with its
            tag, such as "vit_small_patch16_224.augreg_in21k_ft_in1k".

    Returns:
        The repository, which need not exist, and the revision (None: the newest); None if the name means no
        repository: it may be a path.
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
    """Download a repository's config.json and weights, or find them in the cache.

    The weights are, as in a folder, model.safetensors, the files that model.safetensors.index.json names, or
    pytorch_model.bin, whichever the repository has first. Files in the cache are not downloaded again, and are used
    if the Hub cannot be reached or HF_HUB_OFFLINE is set. An interrupted download continues where it stopped. The
    weights are not checked here: compare their sha256.

    Args:
        repo: "organization/name".
        revision: a branch, a tag or a full commit hash; None is the newest commit.
        endpoint: the Hub's address; None is HF_ENDPOINT or https://huggingface.co.
        cache_dir: None is HF_HUB_CACHE or ~/.cache/huggingface/hub.

    Raises:
        HubError: a file is not in the cache and cannot be downloaded.
    """
    config = _fetch(repo, "config.json", revision, endpoint, cache_dir)
    commit = config.parent.name  # .../snapshots/<commit>/config.json
    # by commit, because a branch may move between the requests
    where = (commit, endpoint, cache_dir)
    preprocessor = None
    if _is_transformers(config):
        preprocessor = _fetch_if_there(repo, "preprocessor_config.json", *where)
    weights = _fetch_if_there(repo, "model.safetensors", *where)
    if weights is None and (index := _fetch_if_there(repo, "model.safetensors.index.json", *where)):
        promises = [_promised_sha256(_fetch(repo, shard, *where)) for shard in _shards(index)]
        return HubFiles(repo, commit, index, config, preprocessor, _joint_sha256(promises))
    weights = weights or _fetch_if_there(repo, "pytorch_model.bin", *where)
    if weights is None:  # which fails, and says so of the usual file
        weights = _fetch(repo, "model.safetensors", *where)
    return HubFiles(repo, commit, weights, config, preprocessor, _promised_sha256(weights))


def _is_transformers(config: Path) -> bool:
    try:
        return "model_type" in read_json(config)
    except CheckpointError:
        return False  # reading its content will say what is wrong with it


def _shards(index: Path) -> list[str]:
    """The files that an index names; they are checked when they are read."""
    files = read_json(index).get("weight_map")
    names = set(files.values()) if isinstance(files, dict) and all(map(_is_name, files.values())) else set()
    return sorted(names)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _fetch_if_there(
    repo: str, file: str, revision: str | None, endpoint: str | None, cache_dir: Path | None
) -> Path | None:
    """As `_fetch`, but None if the repository has no such file."""
    from huggingface_hub import errors, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision)
    if cached is not None and not isinstance(cached, str):
        return None  # the cache has recorded that the repository lacks it
    try:
        return _fetch(repo, file, revision, endpoint, cache_dir)
    except HubError as error:
        cause = error.__cause__
        if isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError):
            return None
        raise


def _fetch(repo: str, file: str, revision: str | None, endpoint: str | None, cache_dir: Path | None) -> Path:
    """The path of one file in the cache, after a download if necessary.

    After a failed request huggingface_hub uses its cache, but if the cache lacks the file it retries for 24 seconds. In
    that case one request of our own, which is not retried, comes first.
    """
    # imported here, because it is slow and rarely needed
    from huggingface_hub import (
        constants,
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    if timeout == constants.DEFAULT_ETAG_TIMEOUT:  # not set by the user
        timeout = _TIMEOUT
    try:
        if revision == "":
            raise ValueError("the revision after '@' is empty")
        if not isinstance(try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision), str):
            with suppress(errors.EntryNotFoundError):  # hf_hub_download will say so too, and record it
                get_hf_file_metadata(hf_hub_url(repo, file, revision=revision, endpoint=endpoint), timeout=timeout)
        path = hf_hub_download(
            repo, file, revision=revision, endpoint=endpoint, cache_dir=cache_dir, etag_timeout=timeout
        )
    except Exception as error:  # among them the HTTP client's own errors, and the client differs between versions
        asked = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
        why = _explain(error, repo, revision, (endpoint or constants.ENDPOINT).rstrip("/"))
        raise HubError(" ".join(f"cannot get {file} of {asked}: {why}".split())) from error
    return Path(path)


def _explain(error: BaseException, repo: str, revision: str | None, endpoint: str) -> str:
    """Why `_fetch` failed, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # "not in the cache": its cause is the Hub's error
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = re.split(r"\.?(?:\s*\n|\. |$)", str(error))[0] or type(error).__name__  # its first sentence

    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"it is not in the cache, and HF_HUB_OFFLINE is set; unset that, {_OTHERWISE}"
    if isinstance(error, ValueError) and status is None:  # huggingface_hub's checks of names
        return f"{detail}; write hf-hub:organization/name or hf-hub:organization/name@revision"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"unknown revision {revision!r}; choose one from {endpoint}/{repo}/commits/main, or leave it out"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"the repository has no such file; look for another at {endpoint}/{repo}/tree/main, {_OTHERWISE}"
    if status in (401, 403, 404):
        return (
            f"the Hub answers {status}, so the repository does not exist, or is private or gated; check the name at "
            f"{endpoint}/{repo}, and if it is gated, accept its terms there and run `hf auth login`"
        )
    if status is not None:
        return f"the Hub at {endpoint} answers {status}; try again in a few minutes, {_OTHERWISE}"
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"the cache cannot be written ({detail}); free some space, or set HF_HUB_CACHE to another folder"
    if isinstance(error, errors.FileMetadataError):
        return f"{endpoint} does not answer as a Hub does ({detail}); check HF_ENDPOINT and the proxy, {_OTHERWISE}"
    if "Consistency check failed" in str(error):
        return f"the download has the wrong size ({detail}); try again, {_OTHERWISE}"
    return f"the connection to {endpoint} failed ({detail}), and it is not in the cache; try again, {_OTHERWISE}"


def _promised_sha256(weights: Path) -> str | None:
    """The sha256 that the Hub stated for a file in the cache: the name of the blob that its link points to.

    None for a file that is not a link (Windows) and for a small file, which git stores under another hash.
    """
    if not weights.is_symlink():
        return None
    # one step, not resolve(): the blob may itself be a link to a store that names files by xet's hash of equal length
    blob = Path(os.readlink(weights)).name
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else None


def _joint_sha256(promises: list[str | None]) -> str | None:
    """The hash of several files, as `Checkpoint.sha256` defines it; None if one of theirs is unknown."""
    known = [promise for promise in promises if promise is not None]
    return joint_sha256(known) if known and len(known) == len(promises) else None
