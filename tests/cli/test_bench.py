"""`vit bench`: what it measures, prints and refuses."""

import json

import pytest
import torch
from PIL import Image

import vit
from vit.cli import bench, main, make_parser, timing
from vit.kernels.cpu.model import missing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """At its real size, the product that measures the machine's peak takes half a second."""
    monkeypatch.setitem(timing.PEAK_SIDE, "cpu", 64)


def test_threads_are_set_and_restored(capsys):
    before = torch.get_num_threads()
    seen = []
    timing.seconds(lambda: seen.append(torch.get_num_threads()), 1, CPU)
    torch.set_num_threads(before)
    assert seen == [1]
    command = ["bench", "--model", "vit_digits_patch4_32", "-b", "1", "--rounds", "1", "--threads"]
    assert main([*command, "1" if before > 1 else "2"]) == 0
    assert torch.get_num_threads() == before


def test_memory_and_profile_use_the_rows_threads(monkeypatch):
    seen = []
    for name, result in (("peak_memory", 1.0), ("profile_kinds", {})):
        monkeypatch.setattr(timing, name, lambda *_, result=result: seen.append(torch.get_num_threads()) or result)
    before = torch.get_num_threads()
    command = ["bench", "--model", "vit_digits_patch4_32", "-b", "1", "--rounds", "1", "--threads", "1,2", "--profile"]
    assert main([*command, "--json"]) == 0
    assert seen == [1, 1, 2, 2] and torch.get_num_threads() == before


def test_rows(capsys, tmp_path):
    command = ["bench", "--model", "vit_digits_patch4_32", "-b", "1,4", "--img-size", "32,48x32", "--rounds", "3"]
    assert main([*command, "--attention", "sdpa,cudnn", "--json", "--profile", "--plot", str(tmp_path / "b.png")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ran, refused = [row for row in rows if "ms" in row], [row for row in rows if "refused" in row]
    assert [(row["size"], row["batch"]) for row in ran] == [([32, 32], 1), ([32, 32], 4), ([48, 32], 1), ([48, 32], 4)]
    for row in ran:
        assert row["low"] <= row["ms"] <= row["high"] and row["rounds"] == 3
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        per_image = timing.flops(vit.load_pretrained("vit_digits_patch4_32").config, tuple(row["size"])) / 1e9
        assert row["gflops"] == pytest.approx(per_image * row["images_per_s"])
        assert row["share_of_peak"] == pytest.approx(row["gflops"] / row["peak_gflops"])
        assert sum(row["profile"].values()) == pytest.approx(1) and row["profile"]["matrix products"] > 0.05
        assert row["environment"]["torch"] == torch.__version__ and row["peak_mib"] > 0
    if not torch.cuda.is_available():
        assert len(refused) == 4 and "attention 'cudnn' runs on cuda, not on cpu" in refused[0]["refused"]
    assert Image.open(tmp_path / "b.png").size == (1050, 705)  # 7 x 4.5 inches, and a row of the legend


def test_optimized(capsys, tmp_path, optimized_dtype):
    dtype = optimized_dtype
    command = ["bench", "--optimize", dtype, "-b", "1", "--rounds", "1"]
    assert main([*command, "--model", "vit_digits_patch4_32", "--attention", "sdpa,reference,cudnn", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["attention"] for row in found] == ["sdpa", "reference", "cudnn"]
    assert all(row["optimize"] == row["dtype"] == dtype for row in found)
    assert "ms" in found[0] and "ms" in found[1] and "refused" in found[2]
    plot = tmp_path / "b.png"
    assert main([*command, "--model", "vit_tiny_patch16_224", "--set", "depth=1", "--plot", str(plot)]) == 0
    head, _, row, _ = capsys.readouterr().out.splitlines()
    assert head.startswith("vit_tiny_patch16_224 (random weights) on ")
    assert row.startswith(f"224x224         1  yes       {dtype}") and plot.exists()


def test_plain_and_optimized_models_in_one_race(capsys):
    command = ["bench", "--model", "vit_digits_patch4_32", "-b", "1,2", "--rounds", "2", "--json"]
    assert main([*command, "--optimize", "none,float32", "--dtype", "float32,bfloat16"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [(None, "float32"), (None, "bfloat16"), ("float32", "float32")]
    assert [(row["batch"], row["optimize"], row["dtype"]) for row in rows] == [
        (b, *one) for b in (1, 2) for one in kinds
    ]
    counted = [row["gflops"] / row["images_per_s"] for row in rows[:3]]
    assert counted[0] == pytest.approx(counted[1]) and 0.7 < counted[2] / counted[0] < 0.95  # its last block is cut


def test_a_dtype_that_cannot_run_here_is_refused_alone(capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    command = ["bench", "--model", "vit_digits_patch4_32", "-b", "1", "--rounds", "1", "--optimize"]
    assert main([*command, "int8,none", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["optimize"], "ms" in row) for row in rows] == [(None, True), ("int8", False)]
    assert "this machine cannot run int8: its processor lacks VNNI" in rows[1]["refused"]
    assert main([*command, "int8"]) == 2
    assert "this machine cannot run int8: its processor lacks VNNI" in capsys.readouterr().err


def test_a_checkpoint_is_raced_with_its_own_attention(capsys, tmp_path):
    model = vit.load_pretrained("vit_digits_patch4_32")
    model.set_attention("reference", [0, 1])
    folder = vit.save_checkpoint(model, tmp_path / "model")
    command = ["bench", "--model", str(folder), "-b", "1", "--rounds", "1", "--json", "--optimize", "none,float32"]
    assert main(command) == 0
    assert [json.loads(line)["attention"] for line in capsys.readouterr().out.splitlines()] == ["reference+sdpa"] * 2
    assert main([*command, "--attention", "sdpa"]) == 0
    assert [json.loads(line)["attention"] for line in capsys.readouterr().out.splitlines()] == ["sdpa"] * 2


def test_a_case_without_enough_memory_is_refused_alone(capsys, monkeypatch):
    command = ["bench", "--model", "vit_digits_patch4_32", "--rounds", "1", "--json", "-b"]
    assert main([*command, f"1,{10**12}"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "ms" in rows[0] and rows[1]["refused"] == "not enough memory"
    forward = vit.ViT.forward
    for text, code in (("DefaultCPUAllocator: can't allocate memory", 0), ("a bug", None)):

        def fail(model, images, *args, text=text):
            if len(images) == 7:
                raise RuntimeError(text)
            return forward(model, images, *args)

        monkeypatch.setattr(vit.ViT, "forward", fail)
        if code is None:
            with pytest.raises(RuntimeError, match="a bug"):
                main([*command, "1,7"])
            continue
        assert main([*command, "1,7"]) == code
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert "ms" in rows[0] and rows[1]["refused"] == "not enough memory"


def test_int8_is_timed_with_the_attention_that_it_chooses():
    if reason := missing("int8"):
        pytest.skip(reason)
    args = make_parser().parse_args(["bench", "--model", "vit_digits_patch4_32", "--optimize", "int8"])
    taken = vit.kernels.optimize(vit.load_pretrained("vit_digits_patch4_32"), "int8").attends[0].name
    models = bench.load(args)
    assert {case.attention for case in bench.cases(args, models)} == {taken}
    args.attention = ["reference"]
    calls, _ = bench.prepare(models, bench.cases(args, models), CPU, lambda cases, _: cases)
    assert {call.func.attends[0].name for call in calls.values()} == {"reference"}


def test_the_table(capsys):
    assert main(["bench", "--model", "vit_tiny_patch16_224", "--img-size", "32", "-b", "2", "--rounds", "1"]) == 0
    head, titles, row, peak = capsys.readouterr().out.splitlines()
    assert head.startswith("vit_tiny_patch16_224 (random weights) on ") and titles.startswith("image size  batch")
    assert row.startswith("32x32           2  no        float32   sdpa")
    assert "a product of at most 64^3 in float32 with" in peak


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-b", "0"], "expected a whole number above 0, got '0'"),
        (["--img-size", "native"], "expected 384 or 224x448"),
        (["--img-size", "30"], "the nearest size that works is 32 x 32"),
        (["--dtype", "int8"], "expected one of float32, bfloat16, float16, got 'int8'"),
        (["--attention", "sdpaa"], "unknown attention 'sdpaa'. Did you mean 'sdpa'"),
        (["--model", "vit_smal"], "unknown model 'vit_smal'"),
        (["--layout", "timm"], "gets random weights: --layout, --prefix and --sha256 are for checkpoints"),
        (["--plot", "b.txt"], "--plot must be a .png"),
        (["--threads", "1000000"], "the number of processors here, got '1000000'"),
        (["--optimize", "none,int7"], "expected one of none, float32, int8, bfloat16, float16, got 'int7'"),
        (["--attention", "varlen", "--json"], "none of these cases can run here"),
    ],
)
def test_refusals(arguments, message, capsys):
    command = ["bench", "--rounds", "1", *([] if "--model" in arguments else ["--model", "vit_tiny_patch16_224"])]
    try:
        code = main([*command, *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error
