"""Models that commands load and optimize, and the options that do not go together."""

import pytest
import torch

import vit
from vit.cli import main, options

DIGITS = "vit_digits_patch4_32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optimize", "float32", "--device", "cuda"],
            "optimized in float32 runs on cpu, so --device cuda",
        ),
        (["--optimize", "int8", "--dtype", "bfloat16"], "takes images in float32, so --dtype bfloat16 cannot go"),
        (["--optimize", "int4"], "'int4'"),
        (["--model", "{fast}", "--optimize", "float32"], "is optimized already, so --optimize cannot go with it"),
        (["--model", "{fast}", "--dtype", "float16"], "takes images in float32, so --dtype float16 cannot go"),
        (["--model", "{fast}", "--device", "cuda"], "optimized in float32 runs on cpu, so --device cuda"),
        (["--model", "{fast}", "--set", "eps=1e-5"], "--layout, --prefix, --sha256 and --set are for checkpoints"),
    ],
)
@pytest.mark.parametrize("command", ["predict {image}", "features {image} -o {out}", "evaluate digits", "bench"])
def test_what_cannot_go_with_optimize(command, arguments, message, digit_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(options, "device", torch.device)  # even if this machine does not have it
    names = {"fast": tmp_path / "fast.safetensors", "out": tmp_path / "out.safetensors"}
    names["image"] = next(digit_files.glob("*.png"))
    vit.kernels.save(vit.kernels.optimize(vit.load_pretrained(DIGITS)), names["fast"])
    if "--model" not in arguments:
        arguments = [*arguments, "--model", DIGITS]
    try:
        code = main([argument.format(**names) for argument in (*command.split(), *arguments)])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1, err
    assert not names["out"].exists()
