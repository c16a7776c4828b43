"""Exact resume: killed anywhere, with any number of workers, a run ends with the same bits. And what it refuses."""

import hashlib
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize

import vit
from vit.training import Recipe, State, restore, save, train
from vit.training.recipes import make_optimizer
from vit.training.run import Folder, read_log

CONFIG = vit.ViTConfig(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
RECIPE = Recipe(steps=12, warmup_steps=2, batch_size=4, mixup=0.4, drop_path=0.3, model_ema_decay=0.9, lr=1e-2)

# A run in a process of its own: OUT, WORKERS, and the step at which it is killed.
PROGRAM = """
import os, signal, sys
import numpy as np, torch
from PIL import Image
import vit
from vit.training import Recipe, train

torch.manual_seed(0)
model = vit.ViT(vit.ViTConfig(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3))
pixels = np.random.default_rng(0).integers(0, 256, (14, 20, 24, 3), dtype=np.uint8)
data = [(Image.fromarray(one), i % 3) for i, one in enumerate(pixels)]
recipe = Recipe(steps=12, warmup_steps=2, batch_size=4, mixup=0.4, drop_path=0.3, model_ema_decay=0.9, lr=1e-2)
out, workers, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def log(record):
    if record["step"] == end:
        os.kill(os.getpid(), signal.SIGKILL)

train(model, data, recipe, out, validation=data[:5], workers=workers, validate_every=4, save_every=2, log=log)
"""


def start(out: Path, workers: int = 0, end: int = -1) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(out), str(workers), str(end)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def digests(out: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.glob("*.safetensors"))}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Killed three times at steps drawn at random, with 0 and 2 workers in turn."""
    assert start(tmp_path / "whole").returncode == 0
    ends = sorted(random.Random().sample(range(1, 12), 3))
    for workers, end in zip((0, 2, 0), ends):
        assert start(tmp_path / "killed", workers, end).returncode == -signal.SIGKILL, ends
    done = start(tmp_path / "killed", workers=2)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole"), ends
    assert len(digests(tmp_path / "whole")) == 2
    log = (tmp_path / "killed" / "log.jsonl").read_text()
    assert log == (tmp_path / "whole" / "log.jsonl").read_text(), ends
    assert [path.name for path in (tmp_path / "killed" / "state").iterdir()] == ["step-0000012"]
    again = start(tmp_path / "killed")  # a run that is complete
    assert again.returncode == 0 and digests(tmp_path / "killed") == digests(tmp_path / "whole")


def make(seed: int = 0) -> State:
    model = randomize(vit.ViT(CONFIG), seed)
    return State(model, make_optimizer(model, RECIPE), torch.amp.GradScaler("cpu", enabled=False))


def step(state: State) -> None:
    state.model(torch.ones(2, 3, 16, 16)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1


def test_all_of_the_state_returns(tmp_path):
    one, two = make(), make(seed=1)
    step(one), step(one)
    one.best = (0.75, -1.1)
    save(tmp_path / "state", one, {"a": (1, 2)})
    restore(tmp_path / "state", two, {"a": (1, 2)})
    assert (two.step, two.best) == (2, (0.75, -1.1))
    step(one), step(two)  # which needs AdamW's moments
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))


def test_another_run_is_refused_by_what_differs(tmp_path):
    ours = randomize(vit.ViT(CONFIG))
    images = pictures(6)
    recipe = Recipe(steps=2, warmup_steps=0, batch_size=2)
    train(ours, images, recipe, tmp_path, facts={"data": "abc"})
    before = digests(tmp_path)
    with pytest.raises(ValueError) as caught:
        train(randomize(vit.ViT(CONFIG)), images, Recipe(steps=2, warmup_steps=0, batch_size=2, lr=1.0), tmp_path)
    text = str(caught.value)
    assert "holds another run (lr 0.0003, now 1.0, data 'abc', now None): repeat the command that began it" in text
    with pytest.raises(ValueError, match=r"another run \(model depth 2, now 1\)"):
        train(vit.ViT(CONFIG.override(depth=1)), images, recipe, tmp_path, facts={"data": "abc"})
    assert digests(tmp_path) == before and len(read_log(tmp_path / "log.jsonl")) == 2


def pictures(count: int) -> list:
    from PIL import Image

    return [(Image.new("RGB", (20, 24), (40 * i, 9, 99)), i % 3) for i in range(count)]


def test_a_full_disk_keeps_the_state_before(tmp_path):
    """The system refuses files above a size, as a full disk would."""
    folder = tmp_path / "state"
    one, two = make(), make(seed=1)
    step(one)
    save(folder, one, {})
    step(one)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"the state of step 2 cannot be saved \(File too large\)"):
            save(folder, one, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in folder.iterdir()] == ["step-0000001"]
    restore(folder, two, {})
    assert two.step == 1
    save(folder, one, {})
    assert [path.name for path in folder.iterdir()] == ["step-0000002"]


def test_what_a_killed_run_has_left_is_no_state(tmp_path):
    one, two = make(), make(seed=1)
    save(tmp_path / "state", one, {})
    (tmp_path / "state" / "step-0000009.part").mkdir()
    restore(tmp_path / "state", two, {})
    assert two.step == 0
    step(one)
    save(tmp_path / "state", one, {})
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-0000001"]


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_a_state_runs_no_code(tmp_path):
    """PyTorch's own reader unpickles a state's index: the control."""
    save(tmp_path / "state", make(), {})
    (index,) = (tmp_path / "state").rglob(".metadata")
    index.write_bytes(pickle.dumps(Hostile(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"cannot read .*step-0000000: it names .*open, which a state does not hold"):
        restore(tmp_path / "state", make(), {})
    assert not (tmp_path / "trace").exists()
    pickle.loads(index.read_bytes()).close()
    assert (tmp_path / "trace").exists()


def test_values_that_are_no_tensors_are_not_read(tmp_path):
    """PyTorch unpickles them with `weights_only=False`."""
    import torch.distributed.checkpoint as dcp

    state = make()
    save(tmp_path / "state", state, {})
    (folder,) = (tmp_path / "state").iterdir()
    parts = state.tensors()
    parts["model"]["class_token"] = Hostile(tmp_path / "trace")
    dcp.save(parts, checkpoint_id=folder, no_dist=True)
    with pytest.raises(
        ValueError, match=r"cannot read .*: it names .*BytesStorageMetadata, which a state does not hold"
    ):
        restore(tmp_path / "state", make(), {})
    assert not (tmp_path / "trace").exists()


def test_two_runs_in_one_folder(tmp_path):
    with Folder(tmp_path), pytest.raises(ValueError, match="another run is at work in .*: wait, or choose another"):
        Folder(tmp_path).__enter__()
    with Folder(tmp_path):  # given up
        pass


def test_a_resumed_run_says_so(tmp_path, capsys):
    def stop(record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    arguments = (pictures(6), Recipe(steps=3, warmup_steps=0, batch_size=2), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(randomize(vit.ViT(CONFIG)), *arguments, save_every=1, log=stop)
    said = []
    for _ in range(2):
        said.append(capsys.readouterr().err)
        train(randomize(vit.ViT(CONFIG)), *arguments, save_every=1)
    said.append(capsys.readouterr().err)
    assert said == [
        "", f"{tmp_path}: going on after step 1\n", f"{tmp_path}: already finished: nothing was trained\n",
    ]  # fmt: skip


def test_the_log_has_each_step_once(tmp_path):
    rows = [{"step": i} for i in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    with Folder(tmp_path) as folder:
        folder.resume(3, 4)
        folder.log(step=4)
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}]
