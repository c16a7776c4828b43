"""vit.weights.hub against a local Hub."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import constants

from vit.weights.hub import HubError, HubFiles, download, parse_name

REPO = "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
OLD, NEW = "0a" * 20, "1b" * 20
WEIGHTS = {commit: random.Random(commit).randbytes(300_001) for commit in (OLD, NEW)}
CONFIG = {OLD: b'{"architecture": "old"}', NEW: b'{"architecture": "new"}'}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever the machine says
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    commits = {c: {"config.json": CONFIG[c], "model.safetensors": WEIGHTS[c]} for c in (OLD, NEW)}
    with HubServer(REPO, commits, {"main": NEW, "v1": OLD}) as server:
        yield server


@pytest.fixture
def get(hub: HubServer, tmp_path: Path) -> Any:
    """download() from the test's Hub into the test's cache."""

    def get(repo: str = REPO, revision: str | None = None) -> HubFiles:
        return download(repo, revision, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")

    return get


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refusal(call: Any, *args: Any) -> str:
    """The text of the HubError that a call must raise, within seconds and on one line."""
    start = time.monotonic()
    with pytest.raises(HubError) as caught:
        call(*args)
    assert time.monotonic() - start < 15, "a failure must not take as long as huggingface_hub's own 24 seconds"
    text = str(caught.value)
    assert "\n" not in text and ";" in text, "one line: what and why; how to go on"
    return text


# --- names


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:"])
def test_a_name_with_the_hubs_prefix(prefix: str) -> None:
    assert parse_name(f"{prefix}org/name") == ("org/name", None)
    assert parse_name(f"{prefix}org/name@v1") == ("org/name", "v1")
    assert parse_name(f"{prefix}org/name@refs/pr/1") == ("org/name", "refs/pr/1")


def test_timms_names_with_a_tag_mean_timms_repositories() -> None:
    assert parse_name("vit_small_patch16_224.augreg_in21k_ft_in1k") == (REPO, None)
    assert parse_name("vit_small_patch16_224.new_tag") == ("timm/vit_small_patch16_224.new_tag", None)


@pytest.mark.parametrize(
    "name",
    ["", "vit_small_patch16_224", "vit_small_patch16_224.", "vit_huge_patch99.tag", "vit_small_patch16_224.safetensors",
     "vit_small_patch16_224.augreg.npz", "./vit_small_patch16_224.tag", "vit_small_patch16_224.tag/model.safetensors",
     "org/name", "model.safetensors", "https://huggingface.co/org/name"],
)  # fmt: skip
def test_everything_else_is_not_a_repository(name: str) -> None:
    assert parse_name(name) is None


# --- downloads that work


def test_a_fresh_download_brings_both_files_of_one_commit(hub: HubServer, get: Any, capfd: Any) -> None:
    files = get()
    assert (files.repo, files.commit) == (REPO, NEW)
    assert files.config.read_bytes() == CONFIG[NEW]
    assert files.weights.read_bytes() == WEIGHTS[NEW]
    assert files.sha256 == sha256(WEIGHTS[NEW])
    assert {r.revision for r in hub.log if r.file == "config.json"} == {"main"}
    assert {r.revision for r in hub.log if r.file == "model.safetensors"} == {NEW}, "main may have moved by then"
    assert capfd.readouterr().err == "", "no progress bar where stderr is no terminal"


def test_what_is_in_the_cache_is_not_downloaded_again(hub: HubServer, get: Any) -> None:
    first = get()
    hub.log.clear()
    assert get() == first
    assert [(r.method, r.file) for r in hub.log] == [("HEAD", "config.json")], "only: is main still this commit?"


def test_a_branch_that_moved_is_followed(hub: HubServer, get: Any) -> None:
    hub.refs["main"] = OLD
    assert get().commit == OLD
    hub.refs["main"] = NEW
    files = get()
    assert (files.commit, files.weights.read_bytes(), files.sha256) == (NEW, WEIGHTS[NEW], sha256(WEIGHTS[NEW]))


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision(get: Any, revision: str) -> None:
    files = get(REPO, revision)
    assert (files.commit, files.config.read_bytes(), files.weights.read_bytes()) == (OLD, CONFIG[OLD], WEIGHTS[OLD])


@pytest.mark.parametrize("revision", [None, "main", NEW])
def test_the_cache_serves_while_the_hub_is_away(hub: HubServer, get: Any, revision: str | None) -> None:
    first = get()
    hub.stop()
    assert get(REPO, revision) == first


def test_the_cache_serves_while_the_hub_is_broken(hub: HubServer, get: Any) -> None:
    first = get()
    hub.answer = (503, {})
    assert get() == first


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    hub: HubServer, get: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is kept: whole chunks, of 10 MiB normally
    hub.cuts = 1
    try:
        files = get()
    except HubError:  # huggingface_hub 0.x goes on in the next call
        files = get()
    first, second = hub.downloads("model.safetensors")
    assert first.start is None
    assert second.start is not None and 0 < second.start <= len(WEIGHTS[NEW]) // 2
    assert files.weights.read_bytes() == WEIGHTS[NEW]
    assert files.sha256 == sha256(WEIGHTS[NEW])


def test_the_sha256_is_the_hubs_even_where_the_blob_is_a_link_itself(get: Any, tmp_path: Path) -> None:
    blob = get().weights.resolve()
    shared = tmp_path / ("f" * 64)  # huggingface_hub 2 shares files between repositories, by another hash
    blob.rename(shared)
    blob.symlink_to(shared)
    assert get().sha256 == sha256(WEIGHTS[NEW])


def test_without_links_the_sha256_is_unknown(get: Any) -> None:
    weights = get().weights
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)
    assert get().sha256 is None


def test_the_environment_variables_are_heard(hub: HubServer, tmp_path: Path) -> None:
    code = f"from vit.weights.hub import download; print(download({REPO!r}).weights)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "env"), "NO_PROXY": "127.0.0.1"}
    for offline in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (run.returncode, run.stderr) == (0, "")
        assert Path(run.stdout.strip()).is_relative_to(tmp_path / "env")
        assert Path(run.stdout.strip()).read_bytes() == WEIGHTS[NEW]
        assert bool(hub.log) == (offline == "0")
        hub.log.clear()


# --- downloads that cannot work


def test_no_hub_and_nothing_in_the_cache(hub: HubServer, get: Any) -> None:
    hub.stop()
    text = refusal(get)
    assert REPO in text and "config.json" in text and hub.endpoint in text
    assert "the connection to" in text and "not in the cache" in text and "vit demo" in text


def test_no_hub_and_only_the_config_in_the_cache(hub: HubServer, get: Any) -> None:
    get().weights.unlink()
    hub.stop()
    assert "model.safetensors" in refusal(get)


def test_a_silent_hub(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, says nothing
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "the connection to" in refusal(lambda: download(REPO, endpoint=endpoint, cache_dir=tmp_path))


def test_offline_mode_and_nothing_in_the_cache(hub: HubServer, get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:  # the switch itself is read at import, see the environment's test
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    assert "HF_HUB_OFFLINE" in refusal(get)
    assert hub.log == []


def test_a_file_that_is_shorter_than_announced(hub: HubServer, get: Any) -> None:
    hub.instead["model.safetensors"] = WEIGHTS[NEW][:200_000]
    text = refusal(get)
    assert "wrong size" in text and "300001" in text and "200000" in text
    hub.instead.clear()
    assert get().weights.read_bytes() == WEIGHTS[NEW], "nothing of the short file is left over"


def test_wrong_bytes_show_in_the_sha256(hub: HubServer, get: Any) -> None:
    hub.instead["model.safetensors"] = WEIGHTS[OLD]
    files = get()
    assert files.sha256 == sha256(WEIGHTS[NEW])
    assert sha256(files.weights.read_bytes()) == sha256(WEIGHTS[OLD])
    hub.instead.clear()
    files.weights.unlink()
    assert get().weights.read_bytes() == WEIGHTS[OLD], "the link alone is not enough: the blob is still there"
    files.weights.resolve().unlink()
    assert get().weights.read_bytes() == WEIGHTS[NEW]


@pytest.mark.parametrize(
    "answer",
    [(401, {}), (401, {"X-Error-Code": "RepoNotFound"}), (404, {"X-Error-Code": "RepoNotFound"}), (404, {}),
     (403, {"X-Error-Code": "GatedRepo"}), (401, {"X-Error-Code": "GatedRepo"}), (403, {})],
)  # fmt: skip
def test_a_repository_that_is_not_there_or_not_for_us(
    hub: HubServer, get: Any, answer: tuple[int, dict[str, str]]
) -> None:
    hub.answer = answer
    text = refusal(get)
    assert f"answers {answer[0]}" in text and "the repository does not exist" in text and "gated" in text
    assert f"{hub.endpoint}/{REPO}" in text and "hf auth login" in text


def test_an_unknown_repository(get: Any) -> None:
    assert "hf-hub:timm/nobody" in refusal(get, "timm/nobody")


def test_an_unknown_revision(get: Any) -> None:
    assert "unknown revision 'v9'" in refusal(get, REPO, "v9")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_repository_without_one_of_the_files(hub: HubServer, get: Any, file: str) -> None:
    del hub.commits[NEW][file]
    text = refusal(get)
    assert f"cannot get {file} of" in text and "has no such file" in text


@pytest.mark.parametrize("status", [400, 500, 503])
def test_a_broken_hub(hub: HubServer, get: Any, status: int) -> None:
    hub.answer = (status, {})
    assert f"answers {status}" in refusal(get)


def test_a_server_that_is_no_hub(hub: HubServer, get: Any) -> None:
    hub.answer = (200, {})  # the login page of a hotel, say
    assert "does not answer as a Hub does" in refusal(get)


@pytest.mark.parametrize("repo", ["", "a/b/c", "org/na me", "org/../name", "-org/name", "org/name.git"])
def test_a_malformed_name(hub: HubServer, get: Any, repo: str) -> None:
    assert "write hf-hub:organization/name" in refusal(get, repo)
    assert hub.log == []


def test_an_empty_revision(hub: HubServer, get: Any) -> None:
    assert parse_name(f"hf-hub:{REPO}@") == (REPO, "")
    assert "revision" in refusal(get, REPO, "")
    assert hub.log == []


def test_a_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = refusal(lambda: download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "file" / "cache"))
    assert "cannot be written" in text and "HF_HUB_CACHE" in text


def test_a_full_disk(get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert "cannot be written" in refusal(get)
