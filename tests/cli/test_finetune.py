"""`vit finetune`: a run from start to end, what the other commands make of it, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import difference
from PIL import Image

import vit
from vit.cli import main
from vit.cli.finetune import duration
from vit.cli.plan import make_recipe
from vit.resources import digit_images

DIGITS = "vit_digits_patch4_32"
CLASSES = ("zero", "one", "two", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Digits by name: 20 of each class to train on, 6 to test."""
    root = tmp_path_factory.mktemp("data")
    images, labels = digit_images()
    for number, name in enumerate(CLASSES):
        own = [image for image, label in zip(images, labels.tolist()) if label == number]
        for i, image in enumerate(own[:26]):
            path = root / ("train" if i < 20 else "test") / name / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


QUICK = (
    "--model",
    DIGITS,
    "--steps",
    "24",
    "-b",
    "8",
    "--hflip",
    "0",
    "--scale",
    "0.8",
    "--lr",
    "1e-3",
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def run_folder(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["finetune", str(folder), "-o", str(out), *QUICK]) == 0
    return out


def test_a_run_prints_its_plan_and_what_came_of_it(folder, tmp_path, call):
    done = call("finetune", folder, "-o", tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"model    {DIGITS}; its head is new, for 4 classes, and zero at first"
    assert lines[1] == "images   32x32, crop 1.0, bicubic, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"
    assert lines.pop(2) == "assumed  position_rule timm (--set states them)"
    del lines[1]
    assert (
        "64 images to train on, 16 to validate, 24 to test (train/, test/, 16 images held out, drawn by class"
        in lines[1]
    )
    assert lines[2] == "classes  4; training images of each: one 16, three 16, two 16, zero 16"
    assert "adamw: opt adamw, lr 0.001, weight_decay 0.05, layer_decay 0.75" in lines[3] and "steps 24" in lines[3]
    assert lines[4].endswith("parameters, 24 steps, 3.0 epochs")
    rows = [line.split() for line in lines if line.split()[:1] in (["8"], ["16"], ["24"])]
    assert [row[:2] for row in rows] == [["8", "1.0"], ["16", "2.0"], ["24", "3.0"]]
    assert any(line.startswith("about ") and line.endswith("to go, without validation") for line in lines)
    assert lines[-1].startswith("test: ") and "of 24 images with these best weights (95 % interval" in lines[-1]
    for name in ("model.safetensors", "model_best.safetensors", "log.jsonl", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert Image.open(tmp_path / "curves.png").width > 500


def test_the_head_is_learned(run_folder, folder):
    """From zeros to more than three in four of the test images; the control is the model before."""
    model = vit.load_pretrained(run_folder / "model_best.safetensors")
    assert model.categories == sorted(CLASSES)
    transform = vit.create_transform(model)
    right = [
        model.categories[model(transform(vit.load_image(file))[None]).argmax()] == file.parent.name
        for file in sorted((folder / "test").rglob("*.png"))
    ]
    assert sum(right) / len(right) > 0.75


def test_the_file_says_where_it_came_from(run_folder):
    model = vit.load_pretrained(run_folder / "model.safetensors")
    parent = model.provenance.parent
    assert parent.source == DIGITS and parent.sha256 == vit.load_pretrained(DIGITS).provenance.sha256
    assert json.loads(parent.recipe)["lr"] == 1e-3
    assert model.preprocessing == vit.load_pretrained(DIGITS).preprocessing


def test_other_commands_take_the_result(run_folder, folder, tmp_path, call):
    model = run_folder / "model.safetensors"
    image = folder / "test" / "two" / "20.png"
    predicted = call("predict", image, "--model", model, "--json")
    assert predicted.returncode == 0 and '"two"' in predicted.stdout
    evaluated = call("evaluate", folder / "test", "--model", model)
    assert evaluated.returncode == 0 and "matched by the model's categories" in evaluated.stdout
    assert call("attention", image, "--model", model, "-o", tmp_path / "a.png").returncode == 0
    converted = call("convert", model, tmp_path / "timm", "--to", "timm")
    assert converted.returncode == 0, converted.stderr
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    ours = vit.load_pretrained(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert difference(ours(x), theirs(x)) < 1e-5


def test_the_same_command_goes_on(folder, tmp_path, call, run_folder):
    """Interrupted by a full disk in the middle, here by an error from the writer of states."""
    import vit.training.loop as loop

    original, calls = loop.save, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "state")
        original(*args)

    loop.save = full
    try:
        done = call("finetune", folder, "-o", tmp_path, *QUICK)
        assert done.returncode == 2 and "No space left on device" in done.stderr
    finally:
        loop.save = original
    done = call("finetune", folder, "-o", tmp_path, *QUICK)
    assert done.returncode == 0
    assert (tmp_path / "model.safetensors").read_bytes() == (run_folder / "model.safetensors").read_bytes()
    other = call("finetune", folder, "-o", tmp_path, *QUICK, "--lr", "1")
    assert other.returncode == 2 and "holds another run (lr 0.001, now 1.0): repeat the command" in other.stderr


def test_another_size_is_saved(folder, tmp_path, call):
    done = call("finetune", folder, "-o", tmp_path, *QUICK, "--steps", "2", "--img-size", "24x40")
    assert done.returncode == 0, done.stderr
    assert vit.load_pretrained(tmp_path / "model.safetensors").preprocessing.size == (24, 40)


def test_other_images_are_refused_on_resume(folder, tmp_path, call):
    data = shutil.copytree(folder, tmp_path / "data")
    assert call("finetune", data, "-o", tmp_path / "run", *QUICK, "--steps", "2").returncode == 0
    (data / "train" / "one" / "00.png").write_bytes((data / "train" / "two" / "00.png").read_bytes() + b"\0")
    done = call("finetune", data, "-o", tmp_path / "run", *QUICK, "--steps", "2")
    assert done.returncode == 2 and "holds another run (other pictures, other data): repeat" in done.stderr


def test_a_csv_file_and_balanced_classes(folder, tmp_path, call):
    rows = [f"{file},{file.parent.name}" for file in sorted((folder / "train").rglob("*.png"))[:44]]
    (tmp_path / "data.csv").write_text("path,label\n" + "\n".join(rows))
    args = ("--steps", "2", "--balanced", "--model-ema-decay", "0.9", "--mixup", "0.2", "--freeze", "2")
    done = call("finetune", tmp_path / "data.csv", "-o", tmp_path / "run", *QUICK, *args)
    assert done.returncode == 0, done.stderr
    assert "classes  3; training images of each: one 16, three 16, two 3" in done.stdout


def test_the_head_of_the_same_classes_is_kept(tmp_path, call):
    done = call("finetune", "digits", "-o", tmp_path / "a", *QUICK, "--steps", "1")
    assert "its head is kept, since the checkpoint has these classes" in done.stdout
    done = call("finetune", "digits", "-o", tmp_path / "b", *QUICK, "--steps", "1", "--head", "new")
    assert "its head is new, for 10 classes" in done.stdout


def test_check_draws_a_batch_and_overfits_it(folder, tmp_path, call):
    done = call("finetune", folder, "-o", tmp_path, *QUICK, "--check")
    assert done.returncode == 0 and " of 8 are right\n" in done.stdout
    assert Image.open(tmp_path / "check.png").size == (8 * 100, 114)
    assert not list(tmp_path.glob("*.safetensors"))
    done = call("finetune", folder, "-o", tmp_path, *QUICK, "--check", "--lr", "1e-9")
    assert (
        done.returncode == 1
        and "are right: nearly all should be, at a much lower loss: try another --lr" in done.stdout
    )


@pytest.mark.parametrize(
    "args, text",
    [
        (["--img-size", "native"], "--img-size native makes no batches"),
        (["--img-size", "33"], "size 33 x 33 is not made of whole patches"),
        (["--epochs", "2"], "--epochs and --steps cannot go together"),
        (["--check", "--strategy", "ddp"], "--check draws and overfits a batch in one process"),
        (["--mixup", "0.2", "--grad-accum-steps", "8"], "mixup blends the images of a part of a batch"),
        (["--strategy", "ddp"], "--strategy ddp needs torchrun --nproc-per-node N -m vit finetune"),
        (["-b", "100"], "batch_size 100 is more than the 64 training images"),
        (["--head", "keep"], "--head keep: the classes of the data are not those of the checkpoint (0, 1, 2 ..."),
        (["--freeze", "7"], "freeze=7 is more than the model's 6 blocks"),
        (["--device", "cuda:77"], "'cuda:77' cannot be used here"),
        (["--max-bad", "-1"], "argument --max-bad: expected a whole number from 0 on, got '-1'"),
        (["-j", "x"], "expected a whole number from 0 on, got 'x'"),
        (["--holdout", "1"], "the share of images to hold out must lie between 0 and 1"),
    ],
)
def test_options_that_do_not_fit(args, text, folder, tmp_path, call):
    done = call("finetune", folder, "-o", tmp_path / "run", *QUICK, *args)
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_counted(folder, tmp_path, call):
    data = shutil.copytree(folder / "train", tmp_path / "data")
    for i in range(2):
        (data / "one" / f"{i:02}.png").write_text("not an image")
    done = call("finetune", data, "-o", tmp_path / "run", *QUICK, "--steps", "8")
    assert done.returncode == 0 and done.stderr.count("vit finetune") == 0
    assert [line.partition(":")[0] for line in done.stderr.splitlines()[:2]] == ["left out"] * 2
    assert done.stderr.endswith("unreadable images left out: 2, named above\n")
    done = call("finetune", data, "-o", tmp_path / "strict", *QUICK, "--steps", "8", "--max-bad", "1")
    assert done.returncode == 2 and "2 images cannot be used, more than max_bad=1 (--max-bad)" in done.stderr


def test_recipes_fill_in_what_their_source_leaves_open():
    from vit.cli import make_parser

    def recipe(*args: str):
        return make_recipe(make_parser().parse_args(["finetune", "data", "-o", "run", *args]), 1000)

    adamw = recipe()
    assert (adamw.steps, adamw.warmup_steps, adamw.lr) == (10 * 62, 62, 3e-4)
    assert recipe("--recipe", "augreg").steps == 500 and recipe("--recipe", "augreg").warmup_steps == 100
    mae = recipe("--recipe", "mae", "-b", "64")
    assert mae.lr == pytest.approx(5e-4 * 64 / 256) and mae.steps == 50 * 15
    assert recipe("--epochs", "0.5").steps == 31 and recipe("--steps", "7", "--warmup-steps", "3").warmup_steps == 3


def test_durations():
    assert [duration(s) for s in (5, 150, 7200)] == ["5 s", "2 min", "2.0 h"]


def test_a_file_is_no_folder(folder, tmp_path, call):
    (tmp_path / "run").write_text("")
    done = call("finetune", folder, "-o", tmp_path / "run", *QUICK)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"vit finetune: --output {tmp_path / 'run'} is a file, expected a folder\n"


def test_a_run_within_its_data_is_refused(folder, call):
    """Its pictures would be images of a class of their own."""
    for out in (folder / "run", folder):
        done = call("finetune", folder, "-o", out, *QUICK)
        assert done.returncode == 2 and "would count as images of a class" in done.stderr


def test_epochs_are_above_0(folder, tmp_path, call):
    done = call("finetune", folder, "-o", tmp_path, "--model", DIGITS, "--epochs", "-3")
    assert done.returncode == 2 and "--epochs must be above 0, got -3.0" in done.stderr


def test_classes_in_another_order_are_another_run(folder, tmp_path, call):
    """A checkpoint with the same classes in its own order: kept, then sorted."""
    first = tmp_path / "first"
    assert call("finetune", folder, "-o", first, *QUICK, "--steps", "2").returncode == 0
    model = vit.load_pretrained(first / "model.safetensors")
    model.categories = model.categories[::-1]
    vit.save_checkpoint(model, tmp_path / "m.safetensors")
    args = ("-o", tmp_path / "run", "--model", tmp_path / "m.safetensors", *QUICK[2:], "--steps", "2")
    assert call("finetune", folder, *args).returncode == 0
    assert vit.load_pretrained(tmp_path / "run" / "model.safetensors").categories == model.categories
    done = call("finetune", folder, *args, "--head", "new")
    assert done.returncode == 2 and "holds another run (categories ['zero'" in done.stderr


def test_an_interrupted_run_says_how_it_goes_on(folder, tmp_path, call, monkeypatch):
    from vit.cli.finetune import Report

    original = Report.show

    def show(self, record):
        original(self, record)
        if record["step"] == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "show", show)
    done = call("finetune", folder, "-o", tmp_path, *QUICK)
    assert done.returncode == 130 and "the same command goes on after step 8" in done.stderr


def test_a_resumed_run_prints_the_rows_of_a_whole_one(folder, tmp_path, call, monkeypatch):
    """Up to the time that it took: a row's loss is the mean of all steps since the last one."""
    from vit.cli.finetune import Report

    def rows(done):
        lines = [line.split() for line in done.stdout.splitlines()]
        return [line[:-1] for line in lines if line[:1] in (["8"], ["16"], ["24"])]

    args = ("finetune", folder, "-o", tmp_path / "run", *QUICK, "--save-every", "3")
    whole = rows(call("finetune", folder, "-o", tmp_path / "whole", *QUICK, "--save-every", "3"))
    original = Report.show

    def show(self, record):
        original(self, record)
        if record["step"] == 14:
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "show", show)
    first = call(*args)
    monkeypatch.undo()
    then = call(*args)
    assert then.returncode == 0 and "going on after step 12" in then.stderr
    assert len(whole) == 3 and rows(first) + rows(then) == whole
    assert "already finished: nothing was trained" in call(*args).stderr


def test_a_closed_pipe_ends_the_run_with_a_failure(folder, tmp_path, call, monkeypatch):
    """`vit finetune ... | head && next` must not go on as if the training were done."""

    def row(*_):
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr("vit.cli.finetune.Report.row", row)
        result = call("finetune", folder, "-o", tmp_path / "run", *QUICK)
    message = "vit finetune: standard output was closed, which has ended the run; the same command goes on\n"
    assert (result.returncode, result.stderr) == (2, message)
    assert call("finetune", folder, "-o", tmp_path / "run", *QUICK).returncode == 0
