"""Conversions from file to file with their reports, checks in other libraries, comparisons."""

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import check_conversion
import pytest
import torch
from checkpoints import TINY
from helpers import FLOAT32, randomize, timm_twin
from peers import check
from safetensors.torch import load_file, save_file

import vit
from vit.cli import main
from vit.weights import CheckpointError
from vit.weights.load import find, load
from vit.weights.save import report_path
from vit.weights.verify import compare, convert_file


def test_a_report_is_written_beside_the_result(tmp_path, model):
    source = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    report = convert_file(source, tmp_path / "b", "transformers")
    file = report_path(tmp_path / "b" / "model.safetensors")
    assert file.name == "model.safetensors.report.json" and json.loads(file.read_text()) == json.loads(
        json.dumps(report)
    )
    target = (tmp_path / "b" / "model.safetensors").read_bytes()
    assert report["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert report["target"]["sha256"] == hashlib.sha256(target).hexdigest()
    assert report["transforms"] == ["fuse q, k, v"] and report["tensors"] == 32
    steps = {step["ours"]: step for step in report["steps"]}
    assert len(steps["blocks.1.attention.qkv.bias"]["target"]) == 3
    assert report["notes"] == [] and report["unsaid"] == {"position_rule": "transformers"}
    assert report["config"]["eps"] == {"value": 1e-6, "from": "the file's header"}
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "config.json", "model.safetensors", "model.safetensors.report.json", "preprocessor_config.json"]  # fmt: skip


def checked(source: object, result: object) -> dict[str, float | str]:
    return check(load(find(source)), load(find(result)))[0]


def test_check_runs_the_source_in_its_own_library(tmp_path):
    vit.save_checkpoint(randomize(vit.ViT(TINY.override(gelu="tanh"))), tmp_path / "a", layout="timm")
    convert_file(tmp_path / "a", tmp_path / "b.npz", "augreg")
    rows = checked(tmp_path / "a", tmp_path / "b.npz")
    assert set(rows) == {"source in timm against source in vit", "result in vit against source in vit",
                         "result in timm against source in vit"}  # fmt: skip
    assert max(rows.values()) <= FLOAT32


@pytest.mark.parametrize("layout", ["timm", "transformers", "torchvision", "dino", "moco", "big_vision_scanned"])
def test_check_runs_the_half_that_has_a_library(tmp_path, model, layout):
    """One of both files is in this project's own layout, which no other library reads."""
    if layout in ("dino", "moco"):
        model.reset_classifier(0)
        model.config = model.config.override(num_classes=0)
    source = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    result = Path(convert_file(source, tmp_path / "b", layout)["target"]["files"][0])
    there = checked(source, result)
    convert_file(tmp_path / "b", tmp_path / "c.safetensors", "vit")
    back = checked(tmp_path / "b", tmp_path / "c.safetensors")
    library = layout if layout in ("transformers", "torchvision") else "timm"
    assert list(there) == ["source in its own library against source in vit", "result in vit against source in vit",
                           f"result in {library} against source in vit"]  # fmt: skip
    assert list(back) == [f"source in {library} against source in vit", "result in vit against source in vit",
                          "result in its own library against source in vit"]  # fmt: skip
    for rows, skipped in ((list(there.values()), 0), (list(back.values()), 2)):
        assert rows.pop(skipped) == "not run: no other library reads the vit layout, this project's own"
        assert max(rows) <= FLOAT32


def test_a_check_that_can_run_nothing_is_refused(tmp_path, model, monkeypatch):
    ours = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    theirs = vit.save_checkpoint(model, tmp_path / "b", layout="timm")
    with pytest.raises(CheckpointError, match="nothing to check against: no other library reads the vit layout"):
        checked(ours, ours)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(CheckpointError, match="nothing to check against: timm is not installed: pip install timm"):
        checked(theirs, theirs)
    convert_file(theirs, tmp_path / "c", "torchvision")
    half = checked(theirs, tmp_path / "c")
    assert half["source in timm against source in vit"] == "not run: timm is not installed: pip install timm"
    assert half["result in torchvision against source in vit"] <= FLOAT32


def test_check_reads_the_result_as_any_user_would(tmp_path, model, capsys):
    """An npz file cannot hold that its GELU is the exact one, so its readers use the other."""
    source = vit.save_checkpoint(model, tmp_path / "a", layout="timm").parent
    assert "gelu" in convert_file(source, tmp_path / "b.npz", "augreg")["unsaid"]
    assert check_conversion.main([str(source), str(tmp_path / "b.npz")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("check_conversion: error: result in vit against source in vit: the largest difference is")
    assert "these settings of the source changed: gelu 'erf' (the result has 'tanh')" in error


def test_what_was_assumed_is_reported(tmp_path, capsys):
    """192 channels in 6 heads, which no file states: 3 of width 64 are assumed, and a check of 3 with 3 passes."""
    wide = randomize(vit.ViT(TINY.override(embed_dim=192, num_heads=6, num_classes=1000))).eval()
    vit.save_checkpoint(wide, tmp_path / "a", layout="transformers")
    save_file(load_file(tmp_path / "a" / "model.safetensors"), tmp_path / "bare.safetensors")
    bare, ours = str(tmp_path / "bare.safetensors"), str(tmp_path / "b.safetensors")
    assert main(["convert", bare, ours, "--to", "vit"]) == 0
    assumed = (
        "assumed     num_heads 3, eps 1e-12, gelu erf, position_rule transformers, img_size (32, 32) "
        "(the transformers layout's defaults; override with --set num_heads=...)\n"
    )
    assert assumed in capsys.readouterr().out
    assert check_conversion.main([bare, ours]) == 0
    note = "note        both sides of the check ran with what is assumed, so it does not prove that\n"
    assert capsys.readouterr().out.startswith(
        assumed + note + "check       source in transformers against source in vit"
    )
    report = json.loads(report_path(Path(ours)).read_text())
    assert report["assumed"]["num_heads"] == {"value": 3, "from": "the transformers layout's default"}
    assert report["assumed"].keys() == {"num_heads", "eps", "gelu", "position_rule", "img_size"}

    assert main(["inspect", ours]) == 0
    printed = capsys.readouterr().out
    assert "num_heads = 3  (the transformers layout's default, by way of the file's header)" in printed
    assert "categories     1000, assumed to be ImageNet-1k's, by way of the file's header" in printed
    report = convert_file(bare, tmp_path / "c.safetensors", "vit", overrides={"num_heads": 6, "eps": 1e-6})
    assert report["assumed"].keys() == {"gelu", "position_rule", "img_size"} and report["notes"] == []
    told = convert_file(tmp_path / "a", tmp_path / "d.safetensors", "vit")
    assert told["assumed"].keys() == {"position_rule"}  # its config.json says the others
    assert check(load(find(tmp_path / "a")), load(find(tmp_path / "d.safetensors")))[1] == []


def test_where_categories_come_from(tmp_path, model, capsys):
    def shown(path):
        assert main(["inspect", str(path)]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("categories "))

    file = tmp_path / "model.safetensors"
    save_file(timm_twin(TINY.override(num_classes=1000)).state_dict(), file)
    assert shown(file) == "categories     1000, assumed to be ImageNet-1k's"
    about = {"architecture": "vit_small_patch16_224", "num_classes": 1000}
    about["model_args"] = {"num_heads": 2, "img_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert shown(file) == "categories     1000, assumed to be ImageNet-1k's"  # as timm does
    (tmp_path / "config.json").write_text(json.dumps(about | {"label_names": [str(i) for i in range(1000)]}))
    assert shown(file) == "categories     1000, from config.json"
    theirs = vit.save_checkpoint(model, tmp_path / "m", layout="transformers")
    assert shown(theirs) == "categories     5, from config.json"
    assert shown(vit.save_checkpoint(model, tmp_path / "m.safetensors")) == "categories     5, from the file's header"
    assert shown(vit.save_checkpoint(vit.ViT(TINY), tmp_path / "m.safetensors")) == "categories     none"


def test_labels_are_attached(tmp_path, model, capsys):
    source = str(vit.save_checkpoint(model, tmp_path / "a.safetensors"))
    command = ["convert", source, str(tmp_path / "b"), "--to", "timm", "--labels", str(tmp_path / "names.txt")]
    for text, message in ((b"one\ntwo\n", "there are 2 categories for 5 classes"), (b"a\n\nb\n", "line 2 is empty"),
                          (b"\xff", "is not UTF-8 text")):  # fmt: skip
        (tmp_path / "names.txt").write_bytes(text)
        assert main(command) == 2 and message in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nvier, fünf\nsix\n", encoding="utf-8")
    assert main(command) == 0
    assert vit.load_pretrained(tmp_path / "b").categories == ["one", "two", "three", "vier, fünf", "six"]


def test_a_config_that_is_wrong_is_seen_by_check(tmp_path, model, capsys):
    """The weights fit with any number of heads; only running the source shows that 4 is not what it has."""
    vit.save_checkpoint(model, tmp_path / "a", layout="timm")
    convert_file(tmp_path / "a", tmp_path / "b.safetensors", "vit", overrides={"num_heads": 4})
    command = [str(tmp_path / "a"), str(tmp_path / "b.safetensors"), "--set", "num_heads=4"]
    assert check_conversion.main(command) == 2
    error = capsys.readouterr().err
    assert re.search(
        "source in timm against source in vit: the largest difference is .*, expected at most 1e-04", error
    )


def test_the_former_option_names_the_script(tmp_path, model, capsys):
    source = str(vit.save_checkpoint(model, tmp_path / "a.safetensors"))
    target, script = str(tmp_path / "b"), "run `python tests/reports/check_conversion.py"
    for arguments, named in (
        ([source, target, "--to", "timm", "--check"], f"{source} {target}"),
        ([source, "--check"], f"{source} DST"),
        (["--check"], "SRC DST"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *arguments])
        assert stop.value.code == 2 and f"{script} {named}`" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_an_optimized_model_is_named_first(tmp_path, capsys):
    """Before anything else that is wrong with the command."""
    source = str(tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1)}, source, {"vit.optimized": "{}"})
    assert main(["convert", source, str(tmp_path / "b.pth"), "--to", "vit"]) == 2
    assert "a.safetensors: this is an optimized model, not a checkpoint" in capsys.readouterr().err


def test_a_conversion_that_does_not_read_back_changes_nothing(tmp_path, model, monkeypatch):
    source = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    target = vit.save_checkpoint(randomize(vit.ViT(TINY), seed=3), tmp_path / "b", layout="torchvision")
    before = target.read_bytes()
    write = vit.weights.save.write_safetensors

    def lossy(path, tensors, metadata):
        write(path, {name: tensor.half().float() for name, tensor in tensors.items()}, metadata)

    monkeypatch.setattr("vit.weights.save.write_safetensors", lossy)
    with pytest.raises(CheckpointError, match="did not read back as written in the torchvision layout"):
        convert_file(source, tmp_path / "b", "torchvision")
    assert target.read_bytes() == before and [p.name for p in (tmp_path / "b").iterdir()] == ["model.safetensors"]


def test_compare(tmp_path, model):
    a = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    b = vit.save_checkpoint(model, tmp_path / "b", layout="transformers")
    assert all(row.difference == 0 and not row.remark for row in compare(load(find(a)), load(find(b))))
    with torch.no_grad():
        model.blocks[1].norm2.bias[3] += 0.5
    c = vit.save_checkpoint(model, tmp_path / "c.npz", layout="augreg")
    rows = [row for row in compare(load(find(a)), load(find(c))) if row.difference]
    assert [row.name for row in rows] == ["blocks.1.norm2.bias"] and abs(rows[0].difference - 0.5) < 1e-6


def test_settings_that_differ_say_whether_it_matters(tmp_path, model, default_checkpoint, capsys):
    """The command and its output in weights/README.md."""
    ours, theirs = str(tmp_path / "vit-s.safetensors"), str(tmp_path / "for-transformers")
    convert_file(default_checkpoint, ours, "vit")
    convert_file(ours, theirs, "transformers")  # where crop_pct is 224 / 248: as many pixels as 0.9 gives
    assert main(["inspect", ours, theirs]) == 1
    readme = (Path(__file__).parents[2] / "weights" / "README.md").read_text(encoding="utf-8")
    assert f"```text\n{capsys.readouterr().out}```\n" in readme

    a = str(vit.save_checkpoint(model, tmp_path / "a.safetensors"))
    model.config = model.config.override(drop_path_rate=0.1, eps=1e-5)
    model.preprocessing = replace(model.preprocessing, mean=(0.1, 0.2, 0.3))
    b = str(vit.save_checkpoint(model, tmp_path / "b.safetensors"))
    assert main(["inspect", a, b]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "eps: 1e-06 and 1e-05 (changes results)",
        "drop_path_rate: 0.0 and 0.1 (changes no result)",
        "preprocessing.mean: (0.5, 0.5, 0.5) and (0.1, 0.2, 0.3) (changes results)",
    ]
