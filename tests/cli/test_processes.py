"""Several processes of torchrun share a command's images, and give what one process gives."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vit
from vit.cli import main, options, processes
from vit.cli.accuracy import count, figures, measure
from vit.image import create_transform
from vit.resources import digit_images

DIGITS = "vit_digits_patch4_32"
MODEL = ("--model", DIGITS, "-b", "4")

# The command line, in which the second process is killed as it renames its second file, after the first has renamed
# all of its own.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from vit.cli import main

output, calls, replace = Path(sys.argv[sys.argv.index("-o") + 1]), [], os.replace

def killed(*names):
    calls.append(names)
    if len(calls) == 2:
        while not all(output.with_name(f"a-{i:05}-of-00006.safetensors").exists() for i in (1, 3, 5)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

if os.environ["RANK"] == "1":
    os.replace = killed
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """21 digits in folders by class, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("digits")
    for i, (image, label) in enumerate(zip(digit_images()[0][:21], digit_images()[1].tolist())):
        (folder / str(label)).mkdir(exist_ok=True)
        image.resize((16 + 5 * (i % 7), 40 - 2 * (i % 5))).save(folder / str(label) / f"{i:02}.png")
    (folder / "3" / "bad.png").write_bytes(b"no image")
    return folder


def torchrun(*args: object) -> subprocess.CompletedProcess:
    """Two processes; `args` begin with a program, or with "-m", "vit"."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def said(done: subprocess.CompletedProcess) -> list[str]:
    """The command's own lines on stderr, without torchrun's."""
    return [line for line in done.stderr.splitlines() if re.match(r"vit \w+: ", line)]


def test_a_process_of_torchrun_ends_without_the_end_of_its_interpreter(folder, tmp_path):
    """In which a thread of gloo may abort it; what it has said arrives, and so does its exit code."""
    (tmp_path / "sitecustomize.py").write_text("import atexit; atexit.register(print, 'the interpreter ends')")
    command = [sys.executable, "-m", "vit", "predict", str(folder), *MODEL]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    alone, one = (
        subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=240)
        for more in ({}, {"RANK": "0", "WORLD_SIZE": "1"})
    )
    assert alone.returncode == one.returncode == 1  # one file is not an image
    assert alone.stdout == one.stdout + "the interpreter ends\n" and one.stdout.count(".png") == 21
    assert alone.stderr == one.stderr and "1 of 22 images" in said(one)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--json", "--img-size", "native"]])
def test_predict(folder, call, options):
    """In the images' order; the last round has a batch for the first process alone."""
    one = call("predict", folder, *MODEL, *options)
    two = torchrun("-m", "vit", "predict", folder, *MODEL, *options)
    assert one.returncode == two.returncode == 1  # one file is not an image
    assert two.stdout == one.stdout and two.stdout.count(".png") == 21 + bool(options) * 2
    assert said(two) == one.stderr.splitlines()


@pytest.mark.slow
def test_evaluate(folder, rows, tmp_path):
    """The same figures, which go on where one process has stopped, and the other way round."""
    args = (folder, *MODEL, "--results", tmp_path / "results.jsonl")
    _, (known,), _ = rows(*args, "--img-size", "24")
    two = torchrun("-m", "vit", "evaluate", *args, "--img-size", "24,32", "--json")
    assert two.returncode == 1 and len(said(two)) == 2 and "bad.png" in said(two)[0]
    first, second = map(json.loads, two.stdout.splitlines())
    assert first == known | {"reused": True} and not second["reused"]
    _, expected, errors = rows(folder, *MODEL, "--img-size", "32")
    assert [second | {"ms_per_image": 0}] == [one | {"ms_per_image": 0} for one in expected]
    assert second["images"] == 21 and second["unreadable"] == 1 and said(two) == errors
    assert rows(*args, "--img-size", "24,32")[1] == [first, second | {"reused": True}]


@pytest.mark.slow
def test_features_of_a_killed_process_are_the_only_ones_to_be_done_again(folder, tmp_path, call):
    command = ("features", folder, *MODEL, "--shard", "4", "-o")
    call(*command, tmp_path / "one" / "a.safetensors")
    (tmp_path / "program.py").write_text(KILLED)
    two = tmp_path / "two"
    killed = torchrun(tmp_path / "program.py", *command, two / "a.safetensors")
    assert killed.returncode != 0 and re.search(rf"exitcode: -{signal.SIGKILL:d}", killed.stderr)
    before = {path.name: path.stat().st_mtime_ns for path in two.glob("a*")}
    assert sorted(before) == [f"a-{i:05}-of-00006.safetensors" for i in (1, 2, 3, 5)]  # neither 4, 6 nor the index
    assert len(list(two.glob(".a-00004*"))) == 1  # what the killed process has left

    again = torchrun("-m", "vit", *command, two / "a.safetensors")
    assert "21 images in 6 files, 4 of them from an earlier run" in again.stdout, again.stderr
    after = {path.name: path.stat().st_mtime_ns for path in two.glob("a*")}
    assert {name: after[name] for name in before} == before and len(after) == 7
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_one_file_for_two_processes(folder, tmp_path, call):
    done = torchrun("-m", "vit", "features", folder / "1", *MODEL, "-o", tmp_path / "a.safetensors")
    assert done.returncode == 0 and done.stdout.count("in 1 file") == 1
    message = "1 file to write, so 1 of 2 processes have nothing to do: a smaller --shard makes more files"
    assert said(done) == [f"vit features: {message}"]
    call("features", folder / "1", *MODEL, "-o", tmp_path / "b.safetensors")
    assert torch.equal(*(load_file(tmp_path / f"{name}.safetensors")["features"] for name in "ab"))


def as_one_of(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(processes, "rank_and_world", lambda: (rank, world))


@pytest.mark.parametrize("images, size, world", [(21, 4, 2), (5, 1, 3), (3, 8, 4), (12, 3, 2)])
def test_each_image_is_one_processs(images, size, world, monkeypatch):
    """And the batches are those of one process."""
    own = []
    for rank in range(world):
        as_one_of(monkeypatch, rank, world)
        own.append(processes.share(images, size))
    assert sorted(i for part in own for i in part) == list(range(images))
    batches = {tuple(part[i : i + size]) for part in own for i in range(0, len(part), size)}
    assert batches == {tuple(range(i, min(i + size, images))) for i in range(0, images, size)}


def test_results_come_in_order(monkeypatch):
    """From three processes, the last of which has nothing to do in the second round."""
    own = []
    for rank in range(3):
        as_one_of(monkeypatch, rank, 3)
        own.append(processes.share(10, 2))
    others = [iter(own[1]), iter(own[2])]
    takes = lambda rows: rows + [i for other in others for _, i in zip(range(2), other)]  # noqa: E731
    monkeypatch.setattr(processes, "gather", takes)
    as_one_of(monkeypatch, 0, 3)
    assert list(processes.in_order(iter(own[0]), 10, 2)) == list(range(10))
    assert own[0] == [0, 1, 6, 7]  # the control: as they lie in one process they are not in order


def test_counts_of_parts_add_up():
    """Parts of different sizes, of which shares of right answers cannot be averaged."""
    model = vit.load_pretrained(DIGITS)
    images, truth = digit_images()
    truth[:20] = 9 - truth[:20]  # so that many answers are wrong
    everything = measure(model, create_transform(model), images[:50], truth[:50], 8, set())
    parts = [
        count(model, create_transform(model), images[part], truth[part], 8, set())
        for part in (slice(8), slice(8, 50), slice(0))
    ]
    found = figures(parts, 50)
    assert found | {"ms_per_image": 0} == everything | {"ms_per_image": 0} and 0 < found["right"] < 50
    assert found["ms_per_image"] > 0


def test_a_process_that_has_ended_is_named(monkeypatch):
    def ended(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    as_one_of(monkeypatch, 0, 2)
    monkeypatch.setattr(processes.dist, "all_gather_object", ended)
    with pytest.raises(OSError, match="another process has ended before its work was done"):
        processes.gather([1])


def test_each_process_has_its_own_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(options.torch, "empty", lambda *_, device: asked.append(device) or torch.zeros(1))
    for rank in (None, "0", "3"):
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert [str(options.device(name)) for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
        options.device("cuda")
    assert asked[2::3] == ["cuda", "cuda:0", "cuda:3"]


def test_one_picture_is_not_shared(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vit.cli.features.rank_and_world", lambda: (0, 2))
    assert main(["features", str(folder), "--pca", "-o", str(tmp_path / "a.png"), *MODEL]) == 2
    assert "--pca draws one picture" in capsys.readouterr().err
