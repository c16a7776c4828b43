"""The visit to a GPU: its stages cannot end each other. `.ci/run` rehearses the whole of it."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent
SCRIPT = """
import json, os, signal, subprocess, sys, time
out, stage = sys.argv[1], sys.argv[3]
print("this is", stage)
with open(out + "/visit.jsonl", "a") as file:
    row = {"stage": stage, "ok": stage != "flash", "rehearsed": os.environ.get("TRITON_INTERPRET")}
    file.write(json.dumps(row) + "\\n")
if stage == "kernels":
    os.kill(os.getpid(), signal.SIGSEGV)
if stage == "model":  # hangs, and so does what it started
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "60"])
    open(out + "/child", "w").write(str(child.pid))
    open(out + "/visit.jsonl", "a").write('{"stage": "mod\\n')
    time.sleep(60)
sys.exit(stage == "flash")
"""


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_visit", BENCHMARKS / "gpu_visit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_visit", module)
    spec.loader.exec_module(module)
    return module


def test_it_ends_within_nine_minutes(visit: ModuleType) -> None:
    assert sum(limit for limit, _ in visit.STAGES.values()) < 9 * 60
    assert all(fn.__doc__ for _, fn in visit.STAGES.values())


def test_no_stage_ends_another(
    visit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One crashes, one hangs with a child of its own, one fails; all others run, and the report says which is which."""
    script = tmp_path / "stage.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(visit, "HERE", script)
    monkeypatch.setattr(visit, "STAGES", {name: (2, fn) for name, (_, fn) in visit.STAGES.items()})
    monkeypatch.setattr(sys, "argv", ["gpu_visit.py", str(tmp_path / "out"), "--rehearse"])
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        visit.main()
    assert ended.value.code == 1 and time.monotonic() - start < 30
    printed = capsys.readouterr().out
    for name, how in {"kernels": "failed (signal 11)", "model": "out of time", "flash": "failed (code 1)"}.items():
        assert f"{name}: {how}" in printed
    assert printed.count(": passed, ") == len(visit.STAGES) - 3
    assert "A rehearsal cannot cover:" in printed and all(line in printed for line in visit.UNCOVERED)
    rows = visit.results(tmp_path / "out")  # without the half line
    assert [row["stage"] for row in rows] == list(visit.STAGES) and {row["rehearsed"] for row in rows} == {"1"}
    assert "this is sweep" in (tmp_path / "out" / "visit.log").read_text()
    child = Path("/proc") / (tmp_path / "out" / "child").read_text() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"  # ended, and perhaps not yet collected


def test_a_wrong_result_fails_its_stage(visit: ModuleType, tmp_path: Path) -> None:
    """Also one that raises; what comes after it still runs."""
    import torch

    torch.manual_seed(0)
    exact = torch.randn(8, 8, dtype=torch.float64)
    theirs = exact * (1 + 1e-3)
    visit.close(tmp_path, exact * (1 + 1.4e-3), exact, theirs)
    assert visit.attempt.failures == 0
    for ours in (exact * (1 + 1.6e-3), torch.full_like(exact, torch.nan)):
        visit.close(tmp_path, ours, exact, theirs)
    assert visit.attempt.failures == 2
    with visit.attempt(tmp_path, what="that"):
        raise RuntimeError("out of resources")
    assert visit.attempt.failures == 3
    last = json.loads((tmp_path / "visit.jsonl").read_text().splitlines()[-1])
    assert last["what"] == "that" and last["failed"] == "RuntimeError: out of resources"


def test_the_bars(visit: ModuleType) -> None:
    """The worst of two runs counts, and what did not run meets nothing."""
    rows = [
        {"stage": "race", "size": 224, "batch": 256, "name": visit.OURS, "ratio": 2.5, "of matmul": 0.44},
        {"stage": "autotuned", "size": 224, "batch": 256, "name": visit.OURS, "ratio": 1.9, "of matmul": 0.46},
        {"stage": "race", "size": 224, "batch": 256, "name": "timm", "ratio": 1.0, "of matmul": 0.2},
        {"stage": "race", "size": 224, "batch": 1, "name": visit.OURS, "ratio": 1.5, "of matmul": 0.01},
        {"stage": "large", "size": 1024, "batch": 8, "name": visit.OURS, "failed": "OutOfMemoryError"},
    ]
    ends = [line.rpartition(": ")[2] for line in visit.bars(rows)]
    assert ends == ["1.90, missed", "0.44, missed", "1.50, met", "not measured"]


def test_one_stage_for_itself(tmp_path: Path) -> None:
    """The first of a rehearsal, as it is."""
    earlier = {"stage": "environment", "ok": False, "what": "of an earlier visit"}
    (tmp_path / "visit.jsonl").write_text(json.dumps(earlier) + "\n")
    command = [sys.executable, BENCHMARKS / "gpu_visit.py", tmp_path, "--rehearse", "--stages", "environment"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "visit.log").read_text()
    assert "of an earlier visit" not in done.stdout
    assert "environment: passed" in done.stdout and "kernels" not in done.stdout.partition("A rehearsal")[0]
    rows = [json.loads(line) for line in (tmp_path / "visit.jsonl").read_text().splitlines()]
    assert [name for row in rows for name in row if name.endswith("/s")] == ["copy TB/s", "matmul TFLOP/s"]
