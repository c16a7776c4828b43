"""Which layout of a kernel is taken: measured once, and remembered."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gpu_cases import DEVICE, MARKS, needs_cuda

from vit.kernels.gpu import tuning
from vit.kernels.gpu.tiles import TILES, Tile

pytestmark = MARKS


@pytest.fixture(autouse=True)
def a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """On a GPU without choices: an empty cache, nothing shipped. Calling it forgets what this process knows."""

    def begin() -> None:
        tuning.remembered.cache_clear()
        tuning.chosen.clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shipped = tmp_path / "tuned.json"
    shipped.write_text('{"choices": {}}')
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    monkeypatch.setattr(tuning, "chosen", {})
    begin()
    yield begin
    tuning.remembered.cache_clear()


def test_the_fastest_is_chosen_once_and_remembered(
    monkeypatch: pytest.MonkeyPatch, a_new_process: Callable[[], None]
) -> None:
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    times = {None: 2.0, "slow": 3.0, Tile(1, 2, 3, 4, 5): 1.0}
    measured = []
    monkeypatch.setattr(tuning, "milliseconds", lambda call, device: measured.append(call()) or times[call()])
    calls = {choice: lambda choice=choice: choice for choice in times}
    x = torch.empty(0)
    assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 3
    assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 3
    times[None] = 0.5
    assert tuning.choose("another", x, calls) is None and len(measured) == 6
    a_new_process()
    assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 6
    known = json.loads(tuning.path().read_text())
    assert known["a GPU, torch.float32: something"] == [1, 2, 3, 4, 5, 1]
    tuning.path().write_text(json.dumps({"of another process": None}))
    fewer = {key: call for key, call in calls.items() if key is None}
    assert tuning.choose("something", x, fewer) is None and len(measured) == 7  # that layout no longer exists
    assert set(json.loads(tuning.path().read_text())) == {"of another process", "a GPU, torch.float32: something"}
    for text in ("{", "[1]", '{"a": [1, 2]}'):
        tuning.path().write_text(text)
        a_new_process()
        with pytest.warns(UserWarning, match="cannot be read, so kernels are measured again"):
            assert tuning.choose("something", x, calls) is None


def test_what_ships_comes_first(monkeypatch: pytest.MonkeyPatch, a_new_process: Callable[[], None]) -> None:
    """On a GPU of the same compute capability, unmeasured, if it works; else everything is measured."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    times, measured, broken = {None: 1.0, Tile(1, 2, 3, 4, 5): 2.0, Tile(2, 2, 3, 4, 5): 3.0}, [], []
    monkeypatch.setattr(tuning, "milliseconds", lambda call, device: measured.append(0) or times[call.keywords["tile"]])

    def call(tile: Tile | None) -> None:
        if tile in broken:
            raise RuntimeError("PassManager::run failed")

    calls = {tile: tuning.partial(call, tile=tile) for tile in times}
    slowest, x = Tile(2, 2, 3, 4, 5), torch.empty(0, dtype=torch.float16)
    key = "compute capability 9.0, torch.float16: something"
    tuning.SHIPPED.write_text(json.dumps({"choices": {key: slowest}}))
    tuning.name_of.cache_clear()
    assert tuning.choose("something", x, calls) == slowest and not measured
    a_new_process()
    broken.append(slowest)
    with pytest.warns(UserWarning, match="does not run here and is left out: PassManager::run failed"):
        assert tuning.choose("something", x, calls) is None
    assert len(measured) == 2 and tuning.read() == {key: None}
    a_new_process()
    broken.clear()
    assert tuning.choose("something", x, calls) is None and len(measured) == 2  # what this machine knows comes first
    tuning.name_of.cache_clear()


def test_what_is_remembered_serves_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch, a_new_process: Callable[[], None]
) -> None:
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    monkeypatch.setattr(tuning.capture, "is_recording", lambda x: True)
    x, calls = torch.empty(0), {None: print, Tile(1, 2, 3, 4, 5): print}
    with pytest.raises(RuntimeError, match="something is not measured yet: call the model once before"):
        tuning.choose("something", x, calls)
    tuning.remember({"a GPU, torch.float32: something": Tile(1, 2, 3, 4, 5)})
    a_new_process()
    assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5)


def test_the_shipped_file_can_be_read() -> None:
    shipped = json.loads((Path(tuning.__file__).parent / "tuned.json").read_text())
    assert set(shipped) == {"measured", "choices"} and isinstance(shipped["measured"], str)
    assert shipped["choices"] or "nothing" in shipped["measured"]
    for key, choice in tuning.as_choices(shipped["choices"]).items():
        kernel = key.partition(": ")[2].split()[0]
        layouts = [] if kernel == "attention" else [*TILES[kernel, True], *TILES[kernel, False]]
        assert choice in (None, "sdpa", "triton", *layouts), key  # or no machine would ever take it


def test_what_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch, a_new_process: Callable[[], None]) -> None:
    """Permanently if the kernel is at fault; for this process only if memory may have been short."""

    def broken(why: str) -> None:
        raise RuntimeError(why)

    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "milliseconds", lambda call, device: call())
    tile = Tile(1, 2, 3, 4, 5)
    for what, why, kept in (("a", "CUDA out of memory", {}), ("b", "PassManager::run failed\nat length", {"b": None})):
        calls = {None: lambda: 1.0, tile: lambda why=why: broken(why)}
        with pytest.warns(UserWarning, match=rf"Tile.* does not run here and is left out: {why.splitlines()[0]}$"):
            assert tuning.choose(what, torch.empty(0), calls) is None
        assert tuning.choose(what, torch.empty(0), calls) is None  # not measured again
        assert tuning.read() == {f"a GPU, torch.float32: {what}": choice for what, choice in kept.items()}
    with pytest.warns(UserWarning, match="plain PyTorch"), pytest.raises(RuntimeError, match="no layout"):
        tuning.choose("c", torch.empty(0), {None: lambda: broken("")})
    with pytest.raises(AttributeError):  # a mistake of ours
        tuning.choose("d", torch.empty(0), {None: lambda: torch.no_such_thing})


def test_wrong_numbers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast: another result than plain PyTorch's, or a part that is never written."""
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    times = {None: 9.0, Tile(1, 2, 3, 4, 5): 1.0, Tile(2, 2, 3, 4, 5): 2.0, Tile(3, 2, 3, 4, 5): 5.0}
    monkeypatch.setattr(tuning, "milliseconds", lambda call, device: call() is None or times[call.keywords["tile"]])
    right, out = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).half(), torch.empty(64, 48).half()
    right[5] = torch.nan  # of an image that has NaN
    wrong, lazy, good = list(times)[1:]

    def call(tile: Tile | None) -> torch.Tensor:
        written = slice(0, 60) if tile == lazy else slice(None)
        out[written] = right[written] * (1 + 2e-3 * (tile == good))
        out[20, 7] += 40 * (tile == wrong)
        return out

    calls = {tile: tuning.partial(call, tile=tile) for tile in times}
    with pytest.warns(UserWarning) as caught:
        assert tuning.choose("something", out, calls) == good
    assert [str(one.message).partition(" does not")[0] for one in caught] == [str(wrong), str(lazy)]
    assert "left out: its result is off by" in str(caught[0].message)


def test_threads_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []

    def measure(calls: dict, timed: object) -> tuple[dict, bool]:
        measured.append(timed)
        time.sleep(0.05)
        return dict.fromkeys(calls, 1.0), False

    monkeypatch.setattr(tuning, "measure", measure)
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
