"""Which layout of a kernel is taken: measured once, and remembered."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gpu_cases import DEVICE, MARKS, needs_cuda

from vit.kernels.gpu import tuning
from vit.kernels.gpu.tiles import Tile

pytestmark = MARKS


def test_the_fastest_is_chosen_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.remembered.cache_clear()
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    times = {"slow": 3.0, Tile(1, 2, 3, 4, 5): 1.0, None: 2.0}
    measured = []
    monkeypatch.setattr(tuning, "milliseconds", lambda call, device: measured.append(call()) or times[call()])
    calls = {choice: lambda choice=choice: choice for choice in times}
    x = torch.empty(0)
    try:
        assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 3
        assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 3
        times[None] = 0.5
        assert tuning.choose("another", x, calls) is None and len(measured) == 6
        tuning.remembered.cache_clear()  # as another process would begin
        assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 6
        known = json.loads(tuning.path().read_text())
        assert known["a GPU, torch.float32: something"] == [1, 2, 3, 4, 5, 1]
        tuning.path().write_text(json.dumps({"of another process": None}))
        fewer = {key: call for key, call in calls.items() if key is None}
        assert tuning.choose("something", x, fewer) is None and len(measured) == 7  # that layout no longer exists
        assert set(json.loads(tuning.path().read_text())) == {"of another process", "a GPU, torch.float32: something"}
        for text in ("{", "[1]", '{"a": [1, 2]}'):
            tuning.path().write_text(text)
            tuning.remembered.cache_clear()
            with pytest.warns(UserWarning, match="cannot be read, so kernels are measured again"):
                assert tuning.choose("something", x, calls) is None
    finally:
        tuning.remembered.cache_clear()


def test_what_does_not_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permanently if the kernel is at fault; for this process only if memory may have been short."""

    def broken(why: str) -> None:
        raise RuntimeError(why)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "remembered", lambda: known)
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "milliseconds", lambda call, device: call())
    tile, known = Tile(1, 2, 3, 4, 5), {}
    for what, why, kept in (("a", "CUDA out of memory", {}), ("b", "PassManager::run failed\nat length", {"b": None})):
        calls = {tile: lambda why=why: broken(why), None: lambda: 1.0}
        with pytest.warns(UserWarning, match=rf"Tile.* does not run here and is left out: {why.splitlines()[0]}$"):
            assert tuning.choose(what, torch.empty(0), calls) is None
        assert tuning.choose(what, torch.empty(0), calls) is None  # not measured again
        assert tuning.read() == {f"a GPU, torch.float32: {what}": choice for what, choice in kept.items()}
    with pytest.warns(UserWarning, match="plain PyTorch"), pytest.raises(RuntimeError, match="no layout"):
        tuning.measure({None: lambda: broken("")}, torch.device("cpu"))
    with pytest.raises(AttributeError):  # a mistake of ours
        tuning.measure({None: lambda: torch.no_such_thing}, torch.device("cpu"))


def test_threads_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []

    def measure(calls: dict, device: torch.device) -> tuple[object, bool]:
        measured.append(device)
        time.sleep(0.05)
        return next(iter(calls)), False

    known: dict = {}
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "remembered", lambda: known)
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: tuning.choose("a", torch.empty(0), {None: print}), range(4)))
    assert found == [None] * 4 and len(measured) == 1


def test_batches_of_one_power_of_two_are_measured_once() -> None:
    found = {rows: tuning.bucket(rows) for rows in (1, 64, 65, 197, 256, 257, 50432, 10**6)}
    assert found == {1: 64, 64: 64, 65: 128, 197: 256, 256: 256, 257: 512, 50432: 65536, 10**6: 65536}


@needs_cuda
def test_a_kernel_is_timed() -> None:
    small, large = (torch.randn(n, n, device=DEVICE) for n in (128, 4096))
    device = small.device
    assert 0 < tuning.milliseconds(lambda: small @ small, device) < tuning.milliseconds(lambda: large @ large, device)
