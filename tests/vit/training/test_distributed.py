"""Two processes on gloo: the numbers of one process, states that either can read, and a sharded model that is saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import difference

import vit
from vit.training.distributed import wrap
from vit.training.run import read_log

pytestmark = pytest.mark.slow  # each run imports PyTorch in two processes

# OUT, the strategy, the dtype of products, and the step at which the run is interrupted.
PROGRAM = """
import faulthandler, os, sys
faulthandler.enable()
from contextlib import nullcontext
import numpy as np, torch, torch.distributed as dist
from PIL import Image
import vit
from vit.training import Images, RandomCrop, Recipe, balanced, train
from vit.training.data import batches, loader
from vit.training.distributed import rank_and_world, whole, wrap
from vit.training.loop import backward

out, strategy, amp, end = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if strategy != "none":
    dist.init_process_group("gloo")
torch.manual_seed(0)
config = vit.ViTConfig(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=3, init_values=0.1)
model = vit.ViT(config)
pixels = np.random.default_rng(0).integers(0, 256, (21, 20, 24, 3), dtype=np.uint8)
data = [(Image.fromarray(one), i % 3) for i, one in enumerate(pixels)]
recipe = Recipe(
    opt="sgd", lr=0.05, steps=8, warmup_steps=2, batch_size=8, grad_accum_steps=2, model_ema_decay=0.7, amp=amp
)

weights = balanced([label for _, label in data[:19]], 3)

def end_processes():
    if strategy != "none":
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # as vit/__main__.py does, which says why

if out.endswith(".pt"):  # the gradients of the first step alone
    called, images = wrap(model, strategy), Images(data, RandomCrop(vit.create_transform(model), 0.3, 0.5), 0)
    (batch,) = loader(images, batches(21, 8, 0, 1, 0, *rank_and_world()), 0, torch.device("cpu"))
    backward(called, batch, recipe, 0, weights, torch.amp.GradScaler("cpu", enabled=False), nullcontext)
    found = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    if rank_and_world()[0] == 0:
        torch.save(found, out)
    end_processes()

class Interrupted(Exception):
    pass

def log(record):
    if record["step"] == end:
        raise Interrupted

result = train(
    model, data, recipe, out, validation=data[:5], strategy=strategy, validate_every=4, save_every=3,
    class_weights=weights, log=log,
)
if strategy == "fsdp":  # a sharded model's other forwards, and saving it by hand
    assert len(result.forward_intermediates(torch.zeros(1, 3, 16, 16))) == 3
    vit.save_checkpoint(result, out + "/by_hand.safetensors")
end_processes()
"""


def start(out: Path, strategy: str, amp: str = "", end: int = -1) -> subprocess.CompletedProcess:
    program = out.parent / "program.py"
    program.write_text(PROGRAM)
    launcher = [] if strategy == "none" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(program), str(out), strategy, amp, str(end)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def compare(one: Path, two: Path, bar: float) -> float:
    """The largest difference of the weights and of the logged figures; the control of each test is that bar."""
    weights = [vit.load_pretrained(out / "model.safetensors").state_dict() for out in (one, two)]
    worst = max(difference(weights[1][name], weights[0][name]) for name in weights[0])
    for a, b in zip(read_log(one / "log.jsonl"), read_log(two / "log.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=max(bar, 1e-5)), (a, b)
    return worst


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    done = start(out, "none")
    assert done.returncode == 0, done.stderr
    return out


def test_the_gradients_are_those_of_one_process(tmp_path):
    """With weighted classes and accumulation: the mean of the processes' means would be another gradient."""
    for strategy in ("none", "ddp", "fsdp"):
        done = start(tmp_path / f"{strategy}.pt", strategy)
        assert done.returncode == 0, done.stderr
    expected = torch.load(tmp_path / "none.pt")
    for strategy in ("ddp", "fsdp"):
        found = torch.load(tmp_path / f"{strategy}.pt")
        assert max(difference(found[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_two_processes_is_that_of_one(strategy, alone, tmp_path):
    """SGD, which adds up the gradients; AdamW would divide tiny differences by themselves."""
    done = start(tmp_path / "run", strategy)
    assert done.returncode == 0, done.stderr
    assert compare(alone, tmp_path / "run", 1e-5) < 1e-5
    if strategy == "fsdp":
        saved = vit.load_pretrained(tmp_path / "run" / "by_hand.safetensors").state_dict()
        expected = vit.load_pretrained(tmp_path / "run" / "model.safetensors").state_dict()
        assert all(difference(saved[name], expected[name]) == 0.0 for name in expected)


@pytest.mark.parametrize("first, second", [("fsdp", "none"), ("none", "ddp"), ("ddp", "fsdp")])
def test_a_run_goes_on_with_another_number_of_processes(first, second, alone, tmp_path):
    out = tmp_path / "run"
    assert start(out, first, end=5).returncode != 0
    assert [path.name for path in (out / "state").iterdir()] == ["step-0000003"]
    done = start(out, second)
    assert done.returncode == 0, done.stderr
    assert compare(alone, out, 1e-5) < 1e-5


def test_half_precision_under_fsdp(alone, tmp_path):
    """Autocast's result up to bfloat16's rounding; the control is that it differs from float32."""
    done = start(tmp_path / "run", "fsdp", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert 1e-6 < compare(alone, tmp_path / "run", 0.1) < 0.2


def test_the_command_line_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vit"]
    command += ["finetune", "digits", "--model", "vit_digits_patch4_32", "-o", str(tmp_path / "run"), "--steps", "4"]
    command += ["--strategy", "ddp", "--hflip", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained  ") == 1  # printed by the first process alone
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["accuracy"] > 0.9


def test_several_processes_need_a_strategy(monkeypatch):
    monkeypatch.setattr("vit.training.distributed.rank_and_world", lambda: (0, 2))
    with pytest.raises(ValueError, match="there are several processes: choose the strategy 'ddp' or 'fsdp'"):
        wrap(vit.ViT(vit.ViTConfig(depth=1)), "none")
