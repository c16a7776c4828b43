"""The race of `benchmarks/cpu.py`, with contestants that only report times."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent
SECONDS = {"timm": 0.2, "ours": 0.1, "openvino": 0.05, "torchao int8, compiled": 1.5}  # for an image
FILE = "race.json"


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The module, in a folder of its own, with a list `built` of the contestants that were started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("cpu_race", BENCHMARKS / "cpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.built, module.running = [], set()

    class Worker:
        def __init__(self, name: str, size: int, threads: int) -> None:
            module.built.append(name)
            if name == "ours, int8":
                raise RuntimeError("ValueError: no VNNI")
            module.running.add(name)
            self.name, self.built, self.process = name, 3.0, SimpleNamespace(wait=lambda: -9)

        def run(self, batch: int, calls: int) -> dict:
            module.happens(self.name, batch)
            once = SECONDS[self.name] * batch
            return {"first": 2 * once, "seconds": [once] * calls, "logits": [1.0, 2.0 + (self.name == "ours")]}

        def end(self) -> None:
            module.running.discard(self.name)

    module.happens = lambda name, batch: None
    monkeypatch.setattr(module, "Worker", Worker)
    yield module


def race(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict]:
    """What it writes."""
    only = ["ours", "openvino", "ours, int8", "torchao int8, compiled"]
    places = ["--img-size", "224", "--threads", "2", "--json", FILE]
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", *only, *places, *options])
    cpu.main()
    assert not cpu.running
    return json.loads(Path(FILE).read_text())["rows"]


def test_rows_for_all_with_times_or_reasons(cpu, monkeypatch, capsys):
    def happens(name: str, batch: int) -> None:
        if name == "openvino" and batch == 8:
            raise BrokenPipeError

    cpu.happens = happens
    rows = {(r["name"], r["batch"]): r for r in race(cpu, monkeypatch, "--batch", "1", "8")}
    assert len(rows) == 5 * 2
    assert rows["ours", 1]["ratio"] == pytest.approx(2) and rows["ours", 1]["ms"] == pytest.approx(100)
    assert rows["ours", 1]["ready"] == pytest.approx(3.2)
    assert rows["ours", 1]["difference"] == pytest.approx(5**-0.5)
    assert rows["timm", 1]["calls"] == 2 * 17 and rows["timm", 8]["calls"] == 6  # 8 take 1.6 s: nothing to warm up
    assert rows["ours", 8]["ms"] == pytest.approx(100)
    assert rows["openvino", 1]["ratio"] == pytest.approx(4)
    assert rows["openvino", 8]["failed"] == "batch 8: ended with -9"
    assert rows["ours, int8", 1]["failed"] == rows["ours, int8", 8]["failed"] == "ValueError: no VNNI"
    slow = "batch 1: 1500 ms per image, more than 5 times timm's time: left out"
    assert rows["torchao int8, compiled", 8]["failed"] == slow
    assert f"| ours, int8 | {rows['ours, int8', 1]['failed']} |" in capsys.readouterr().out


def test_it_goes_on_where_it_was_interrupted(cpu, monkeypatch, capsys):
    def happens(name: str, batch: int) -> None:
        if name == "ours" and batch == 8:
            raise KeyboardInterrupt

    cpu.happens = happens
    with pytest.raises(KeyboardInterrupt):
        race(cpu, monkeypatch, "--batch", "1", "8")
    assert not cpu.running and {r["batch"] for r in json.loads(Path(FILE).read_text())["rows"]} == {1}
    cpu.happens = lambda name, batch: batch == 1 and pytest.fail("measured again")
    assert len(race(cpu, monkeypatch, "--batch", "1", "8")) == 5 * 2
    cpu.built.clear()
    capsys.readouterr()
    race(cpu, monkeypatch, "--batch", "8", "1")
    assert cpu.built == [] and capsys.readouterr().out.count("times as fast as timm") == 2


@pytest.mark.parametrize("change", ["other seconds", "other contestants", "damaged"])
def test_figures_of_something_else_are_not_kept(cpu, monkeypatch, change):
    race(cpu, monkeypatch, "--batch", "1")
    if change == "damaged":
        Path(FILE).write_text("{")
    before = Path(FILE).read_text()
    other = {"other seconds": ["--seconds", "3"], "other contestants": ["--only", "ours"]}.get(change, [])
    with pytest.raises(
        SystemExit, match=r"race\.json was not written by this code, on this machine, with these options"
    ):
        race(cpu, monkeypatch, "--batch", "1", *other)
    assert Path(FILE).read_text() == before


def test_without_timm_there_is_no_race(cpu, monkeypatch):
    def happens(name: str, batch: int) -> None:
        if name == "timm":
            raise RuntimeError("ImportError: no timm")

    cpu.happens = happens
    with pytest.raises(SystemExit, match="timm failed, to which all others are compared: batch 1: ImportError"):
        race(cpu, monkeypatch)
    assert not cpu.running and not Path(FILE).exists()
