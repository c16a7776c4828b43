"""--runtime: our files in the other runtime, and files of other tools, with what their user says of them."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from exporting_cases import small
from helpers import images, randomize, refused_in_one_line
from PIL import Image
from safetensors import safe_open
from skimage import data
from timm.data import create_transform

import vit
from vit.cli import timing
from vit.exporting.foreign import ForeignModel

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
SIZE, MEAN, STD = (32, 48), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SAID = ("--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.25")
OPENVINO = pytest.param("openvino", marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('openvino')"))


@pytest.fixture(scope="module")
def peer():
    """timm's own model: 2 x 2 attention heads, ten classes, other sides than a square."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )
    return randomize(model).eval()


def write(model: torch.nn.Module, path, x=None, outputs=("output",), sides=None):
    """As any tool does it; the number of images is free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(2, 3, *SIZE) if x is None else x,), path, dynamo=True, verbose=False,
            input_names=["x"], output_names=list(outputs), dynamic_shapes=({0: "batch", **(sides or {})},),
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def foreign(peer, tmp_path_factory):
    """timm's model as ONNX, for any number of images of one size."""
    return write(peer, tmp_path_factory.mktemp("foreign") / "timm.onnx")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(data, name)()).resize((200, 150)).save(folder / f"{name}.png")
    return folder


class Pool(torch.nn.Module):
    """Images of any size -> the outputs that a test wants."""

    def __init__(self, answer):
        super().__init__()
        self.conv, self.answer = randomize(torch.nn.Conv2d(3, 5, 4, 4)), answer

    def forward(self, x):
        return self.answer(self.conv(x).mean(dim=(2, 3)))


def probabilities(result) -> torch.Tensor:
    """What `vit predict --json -k 10` printed: [images, classes]."""
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line)["predictions"] for line in result.stdout.splitlines()]
    return torch.tensor([[one["probability"] for one in sorted(row, key=lambda one: one["class"])] for row in rows])


@pytest.fixture(scope="module")
def truth(peer, pictures):
    """timm's model on timm's transform."""
    transform = create_transform((3, *SIZE), interpolation="bilinear", mean=MEAN, std=STD, crop_pct=0.8)
    x = torch.stack([transform(Image.open(path)) for path in sorted(pictures.iterdir())])
    with torch.no_grad():
        return peer(x).softmax(dim=1)


@pytest.mark.parametrize("runtime", ["onnxruntime", OPENVINO])
def test_a_file_of_timm_answers_as_timm(runtime, foreign, pictures, truth, call):
    common = ("predict", pictures, "--model", foreign, "--json", "-k", 10, "--runtime", runtime)
    common += ("--crop-pct", 0.8, "--interpolation", "bilinear")
    found = probabilities(call(*common, *SAID))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
    wrong = probabilities(call(*common, "--mean", "0.6,0.5,0.4", *SAID[2:]))
    assert (wrong - truth).abs().max() > 1e-3
    wrong = probabilities(call(*common, *SAID, "--interpolation", "bicubic"))
    assert (wrong - truth).abs().max() > 1e-5


def test_our_file_in_openvino(pictures, tmp_path, call):
    pytest.importorskip("openvino")
    vit.export(small(), tmp_path / "ours.onnx", outputs=("logits", "features"))
    found = {
        runtime: vit.load_exported(tmp_path / "ours.onnx", runtime=runtime) for runtime in ("onnxruntime", "openvino")
    }
    x = images(3, 3, 8, 40)
    one, other = (model.run(x) for model in found.values())
    assert [model.session.name for model in found.values()] == [*found]
    for name in ("logits", "features"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)
    result = call("predict", pictures, "--model", tmp_path / "ours.onnx", "--runtime", "openvino", "--json")
    assert json.loads(result.stdout.splitlines()[0])["predictions"][0]["label"].startswith("a ")
    result = call("predict", pictures, "--model", tmp_path / "ours.onnx", "--runtime", "openvino", *SAID)
    assert "says itself how its images are prepared: leave out --mean, --std" in result.stderr


@pytest.mark.parametrize("runtime", ["onnxruntime", OPENVINO])
def test_threads_get_their_own_answers(runtime, foreign):
    model = ForeignModel(foreign, runtime, {}, threads=1)
    batches = [images(4, 3, *SIZE, seed=i) for i in range(40)]
    wanted = [model(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(model, batches), wanted):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_files_of_openvino(foreign, pictures, truth, tmp_path, call):
    openvino = pytest.importorskip("openvino")
    vit.export(small(), tmp_path / "ours.xml", "openvino")
    with pytest.raises(ValueError, match=r"ours.xml can be opened by openvino, not by 'onnxruntime'"):
        vit.load_exported(tmp_path / "ours.xml", runtime="onnxruntime")
    result = call("predict", pictures, "--model", tmp_path / "ours.xml", "--runtime", "openvino")
    assert result.returncode == 0, result.stderr
    openvino.save_model(openvino.Core().read_model(foreign), tmp_path / "theirs.xml")
    result = call("predict", pictures, "--model", tmp_path / "theirs.xml")
    assert "vit export did not write" in result.stderr and "say --runtime openvino" in result.stderr
    result = call(
        "predict", pictures, "--model", tmp_path / "theirs.xml", "--runtime", "openvino", "--json", "-k", 10, *SAID,
        "--crop-pct", 0.8, "--interpolation", "bilinear",
    )  # fmt: skip
    torch.testing.assert_close(probabilities(result), truth, rtol=1e-2, atol=1e-3)  # weights in float16
    (tmp_path / "cut.xml").write_bytes((tmp_path / "theirs.xml").read_bytes()[:-100])
    shutil.copy(tmp_path / "theirs.bin", tmp_path / "cut.bin")
    result = call("predict", pictures, "--model", tmp_path / "cut.xml", "--runtime", "openvino", *SAID)
    assert "openvino cannot open" in result.stderr and result.stderr.count("\n") == 1


def test_weights_beside_a_graph_count(tmp_path):
    """The same graph with other weights is another model, of which stored results say nothing."""
    onnx = pytest.importorskip("onnx")
    write(Pool(lambda x: x), tmp_path / "whole.onnx")
    found = []
    for i in range(2):
        model, path = onnx.load(tmp_path / "whole.onnx"), tmp_path / str(i) / "model.onnx"
        path.parent.mkdir()
        (weight,) = (tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
        weight.raw_data = torch.full(tuple(weight.dims), i / 10).numpy().tobytes()
        onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=100)
        found.append((ForeignModel(path, "onnxruntime", {}), path.read_bytes()))
    (first, graph), (second, same) = found
    assert graph == same and first.provenance.sha256 != second.provenance.sha256


def test_evaluate(peer, foreign, labelled, tmp_path, call):
    """The same answers as timm's model gives; tokens are not known."""
    common = ("evaluate", labelled, "--model", foreign, "--json", "--class-order", "text", "--mode", "squash")
    common += ("--runtime", "onnxruntime", "--results", tmp_path / "rows.jsonl", "-b", 7)
    result = call(*common, *SAID)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    right = 0
    for path in sorted(labelled.rglob("*.png")):
        image = Image.open(path).convert("RGB").resize(SIZE[::-1], Image.Resampling.BICUBIC)
        x = (torch.from_numpy(np.array(image)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        label = next(int(part) for part in path.relative_to(labelled).parts if part.isdigit())
        right += peer(x.permute(2, 0, 1)[None]).argmax().item() == label
    assert (row["right"], row["images"], row["tokens"], row["size"]) == (right, 40, None, "32x48")
    assert not row["reused"] and json.loads(call(*common, *SAID).stdout)["reused"]
    assert not json.loads(call(*common, "--mean", "0.5,0.5,0.5", *SAID[2:]).stdout)["reused"]
    assert " - " in call(*(one for one in common if one != "--json"), *SAID).stdout


def test_features(peer, foreign, pictures, tmp_path, call):
    """The only output that is [B, N], or the one that is named so."""
    two = write(Pool(lambda x: (x, x + 1)), tmp_path / "two.onnx", outputs=("logits", "features"))
    for i, model in enumerate((foreign, two)):
        output = tmp_path / f"{i}.safetensors"
        common = ("features", pictures, "-o", output, "--model", model, "--runtime", "onnxruntime", "--mode", "squash")
        result = call(*common, *SAID)
        assert result.returncode == 0, result.stderr
        paths = sorted(pictures.iterdir())
        transform = vit.create_transform(ForeignModel(model, "onnxruntime", {"mean": MEAN, "std": STD}), mode="squash")
        x = torch.stack([transform(Image.open(path)) for path in paths])
        with torch.no_grad():
            wanted = peer(x) if i == 0 else ForeignModel(model, "onnxruntime", {}).run(x)["logits"] + 1
        with safe_open(output, "pt") as file:
            torch.testing.assert_close(file.get_tensor("features"), wanted, rtol=1e-4, atol=1e-5)
        assert "its transform is" in call(*common, "--mean", "0.5,0.5,0.5", *SAID[2:]).stderr
    (tmp_path / "no.png").write_text("no image")
    result = call("features", tmp_path / "no.png", "-o", tmp_path / "none.safetensors", *common[4:], *SAID)
    with safe_open(tmp_path / "none.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (0, 5)


def test_bench(foreign, call, monkeypatch):
    monkeypatch.setitem(timing.PEAK_SIDE, "cpu", 64)
    common = ("bench", "--model", foreign, "--runtime", "onnxruntime", "--rounds", 2)
    rows = [json.loads(line) for line in call(*common, "--json", "-b", "1,3").stdout.splitlines()]
    assert [(row["batch"], row["size"], row["gflops"]) for row in rows] == [(1, [32, 48], None), (3, [32, 48], None)]
    assert call(*common, "-b", 2, "--img-size", "32x48").stdout.splitlines()[2].endswith("-          -")
    assert "takes images of 32 x 48, not 32 x 32" in call(*common, "--img-size", "32x48,32").stderr


def test_probabilities_are_not_made_probabilities_again(pictures, tmp_path, call):
    """ultralytics' files end in softmax."""
    files = [
        write(Pool(answer), tmp_path / f"{i}.onnx")
        for i, answer in enumerate((lambda x: 9 * x, lambda x: (9 * x).softmax(dim=1)))
    ]
    logits, shares = (
        probabilities(call("predict", pictures, "--model", file, "--runtime", "onnxruntime", "--json", *SAID))
        for file in files
    )
    torch.testing.assert_close(logits, shares, rtol=1e-4, atol=1e-6)
    assert logits.max() > 0.5  # a second softmax would give at most 0.4


def test_sizes(tmp_path):
    sides = {i: torch.export.Dim(name, min=4) for i, name in ((2, "height"), (3, "width"))}
    path = write(Pool(lambda x: x), tmp_path / "dynamic.onnx", sides=sides)
    refused_in_one_line(lambda: ForeignModel(path, "onnxruntime", {}), "more than one size: say --img-size")
    model = ForeignModel(path, "onnxruntime", {}, [(20, 40), (8, 8)])
    assert model.preprocessing.size == (20, 40) and model(images(3, 3, 12, 16)).shape == (3, 5)
    refused_in_one_line(lambda: ForeignModel(path, "onnxruntime", {}, [(2, 2)]), r"cannot run .* \[2, 3, 2, 2\]")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda x: (x, x + 1),
            r"must have one output \[B, N\], or one named logits; for these images it gives a float",
        ),
        (lambda x: x[:, :, None], r"gives a float32 \[2, 5, 1\]$"),
        (lambda x: x.argmax(dim=1, keepdim=True), r"gives a int64 \[2, 1\]$"),
    ],
)
def test_other_outputs(answer, message, tmp_path):
    path = write(Pool(answer), tmp_path / "model.onnx", outputs=("a", "b")[: 1 + message.startswith("must")])
    refused_in_one_line(lambda: ForeignModel(path, "onnxruntime", {}), message)


def test_other_inputs(tmp_path):
    class Bytes(torch.nn.Module):
        def forward(self, x):
            return x.float().mean(dim=(2, 3))

    write(Bytes(), tmp_path / "m.onnx", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    refused_in_one_line(
        lambda: ForeignModel(tmp_path / "m.onnx", "onnxruntime", {}),
        r"must have one input, float32 \[B, C, H, W\]; it has x uint8 \[any, 3, 8, 8\]",
    )
    write(Bytes(), tmp_path / "m.onnx", torch.zeros(2, 8, 8, 3))
    refused_in_one_line(
        lambda: ForeignModel(tmp_path / "m.onnx", "onnxruntime", {}),
        r"takes channels last, x float32 \[any, 8, 8, 3\]: export it for \[B, C, H, W\]",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SAID[:2], "does not say how its images are prepared: say --mean and --std"),
        ((*SAID, "--img-size", "32"), "timm.onnx takes images of 32 x 48, not 32 x 32"),
        ((*SAID, "--img-size", "native"), "does not show its patches, which --img-size native would need"),
        ((*SAID, "--mode", "native", "--max-tokens", 9), "which --mode native, --max-tokens would need"),
        (("--mean", "123,116,103", *SAID[2:]), "expected numbers for pixels from 0 to 1, got '123,116,103'"),
        (("--mean", "a", *SAID[2:]), "expected numbers such as 0.5,0.5,0.5, got 'a'"),
        (("--mean", "0.5", "--std", "0.5"), "takes 3 channels, and --mean has 1 numbers: give one for each"),
        ((*SAID[:2], "--std", "0,1,1"), "std must be above 0"),
        ((*SAID, "--crop-pct", "2"), "crop_pct must lie in (0, 1], not 2.0"),
        ((*SAID, "--optimize", "int8"), "leave out --optimize"),
        ((*SAID, "--model", "DAMAGED"), "onnxruntime cannot open"),
        ((*SAID, "--model", "vit_digits_patch4_32"), "expected an exported file, .onnx or .xml"),
        ((*SAID, "--model", "gone.onnx"), "gone.onnx is not a file"),
    ],
)
def test_refusals(arguments, message, foreign, pictures, tmp_path, call):
    (tmp_path / "damaged.onnx").write_bytes(foreign.read_bytes()[:-300])
    arguments = [tmp_path / "damaged.onnx" if one == "DAMAGED" else one for one in arguments]
    result = call("predict", pictures, "--model", foreign, "--runtime", "onnxruntime", *arguments)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_without_runtime(foreign, pictures, call):
    """A checkpoint, whose weights are read; it says itself how images are prepared."""
    result = call("predict", pictures, "--model", foreign, *SAID)
    assert result.returncode == 2 and "--mean, --std goes with --runtime only" in result.stderr
    assert "exported file" not in call("inspect", foreign).stdout
    result = call("attention", pictures, "--model", foreign, "--runtime", "onnxruntime")
    assert result.returncode == 2 and "unrecognized arguments: --runtime" in result.stderr
