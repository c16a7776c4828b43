"""`vit bench`: what it counts, in which order it measures, what it prints and refuses."""

import json
import math

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import vit
from vit.cli import bench, main, make_parser, timing
from vit.cli.timing import Case
from vit.kernels.cpu.model import missing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """The product that stands for what the machine can do takes half a second at its real size."""
    monkeypatch.setitem(timing.PEAK_SIDE, "cpu", 64)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reg_tokens": 4, "class_position": False},
        {"num_classes": 0},
        {"in_chans": 1, "mlp_ratio": 2},
        {"dist_token": True, "global_pool": "dist"},
        {"global_pool": "token_avg"},
    ],
)
@pytest.mark.parametrize("size", [(224, 224), (64, 160)])
def test_operations_are_those_that_pytorch_counts(fields, size):
    with torch.device("meta"):
        model = vit.create_model("vit_small_patch16_224", **fields).eval()
        images = torch.empty(3, model.config.in_chans, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    resampling = 0 if size == (224, 224) else counted_resampling(model, size)
    assert counter.get_total_flops() - resampling == 3 * timing.flops(model.config, size)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("fields", [{}, {"dist_token": True, "global_pool": "dist"}, {"global_pool": "avg"}])
def test_operations_of_an_optimized_model(fields, cut):
    """Of the last block fewer, where it is cut."""
    small = {"img_size": 32, "embed_dim": 64, "num_heads": 2, "depth": 3}
    model = vit.create_model("vit_small_patch16_224", **small, **fields).eval()
    model.set_attention("reference" if cut else lambda q, k, v, *, bias=None: vit.attention.reference(q, k, v))
    fast = vit.kernels.optimize(model)
    count = {torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * math.prod(x[:-1]) * w[0] * w[1]}
    with FlopCounterMode(display=False, custom_mapping=count) as counter, torch.inference_mode():
        fast(torch.randn(2, 3, 32, 32))
    read = fast.tokens_read()
    assert (read is None) == (not cut or "avg" in fields.values())
    assert counter.get_total_flops() == 2 * timing.flops(model.config, (32, 32), read)


def counted_resampling(model: vit.ViT, size: tuple[int, int]) -> int:
    """Products that resample positions, which the count leaves out: they are once per call, not per image."""
    from vit.position import resample_position_embedding

    positions = model.position_embedding[:, model.config.num_position_rows :]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        resample_position_embedding(positions, model.config.grid, (size[0] // 16, size[1] // 16))
    return counter.get_total_flops()


def test_cases_run_in_turn_and_backwards(monkeypatch):
    a, b, c = cases = [Case((32, 32), batch, None, "float32", "sdpa", 1) for batch in (1, 2, 4)]
    order = []
    monkeypatch.setattr(timing, "seconds", lambda call, threads, device: order.append(call()) or len(order))
    times = timing.race({case: lambda case=case: case for case in cases}, 3, CPU, lambda order: order)
    assert order == [c, b, a, a, b, c, c, b, a, a, b, c]
    assert times == {a: [4, 9, 10], b: [5, 8, 11], c: [6, 7, 12]}  # the first three warmed up


def test_threads_are_set_and_set_back(capsys):
    before = torch.get_num_threads()
    seen = []
    timing.seconds(lambda: seen.append(torch.get_num_threads()), 1, CPU)
    torch.set_num_threads(before)
    assert seen == [1]
    command = ["bench", "--model", "vit_digits_patch4_32", "-b", "1", "--rounds", "1", "--threads"]
    assert main([*command, "1" if before > 1 else "2"]) == 0
    assert torch.get_num_threads() == before


def test_memory_is_what_is_allocated_at_the_highest():
    def call():
        a = torch.ones(2**18)  # 1 MiB
        del a
        return torch.ones(2**19), torch.ones(2**18)

    assert timing.peak_memory(call, CPU) == pytest.approx(3, abs=0.1)


def test_spread():
    assert timing.spread([3.0]) == (3.0, 3.0, 3.0)
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_memory_and_profile_are_those_of_a_rows_threads(monkeypatch):
    seen = []
    for name, result in (("peak_memory", 1.0), ("profile_kinds", {})):
        monkeypatch.setattr(timing, name, lambda *_, result=result: seen.append(torch.get_num_threads()) or result)
    before = torch.get_num_threads()
    command = ["bench", "--model", "vit_digits_patch4_32", "-b", "1", "--rounds", "1", "--threads", "1,2", "--profile"]
    assert main([*command, "--json"]) == 0
    assert seen == [1, 1, 2, 2] and torch.get_num_threads() == before


def test_the_peak_is_taken_from_smaller_products_where_large_ones_take_too_long(monkeypatch):
    sides = []
    monkeypatch.setattr(timing, "product", lambda kind, side, device: lambda: sides.append(side))
    for side, took in ((64, 0.003), (16, 0.1), (8, 2.0)):
        sides.clear()
        monkeypatch.setattr(timing, "seconds", lambda call, *_, took=took: call() or took)
        timing.peak_flops("bfloat16", 1, CPU)
        assert sides == [8] * 2 + [side] * 5


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
    assert Image.open(tmp_path / "b.png").size == (1050, 675)


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


def test_models_as_they_are_and_optimized_in_one_race(capsys):
    command = ["bench", "--model", "vit_digits_patch4_32", "-b", "1,2", "--rounds", "2", "--json"]
    assert main([*command, "--optimize", "none,float32", "--dtype", "float32,bfloat16"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [(None, "float32"), (None, "bfloat16"), ("float32", "float32")]
    assert [(row["batch"], row["optimize"], row["dtype"]) for row in rows] == [
        (b, *one) for b in (1, 2) for one in kinds
    ]
    counted = [row["gflops"] / row["images_per_s"] for row in rows[:3]]
    assert counted[0] == pytest.approx(counted[1]) and 0.7 < counted[2] / counted[0] < 0.95  # its last block is cut


def test_what_cannot_be_optimized_here_is_refused_by_itself(capsys, monkeypatch):
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


def test_what_there_is_no_memory_for_is_refused_by_itself(capsys, monkeypatch):
    command = ["bench", "--model", "vit_digits_patch4_32", "--rounds", "1", "--json", "-b"]
    assert main([*command, f"1,{10**10},{10**30}"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "ms" in rows[0] and "more than any memory holds" in rows[2]["refused"]
    assert "memory" in rows[1]["refused"]
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


def test_int8_is_timed_with_the_attention_that_it_takes():
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
        (["--threads", "1000000"], "as many as there are processors, got '1000000'"),
        (["--optimize", "none,int7"], "expected one of none, float32, int8, bfloat16, float16, got 'int7'"),
        (["--attention", "varlen", "--json"], "none of this can run here"),
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
