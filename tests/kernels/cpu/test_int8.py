"""int8 models against a plain twin that rounds as they do and computes in float32; what calibration refuses."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import model
from helpers import difference, images, operations
from torch import Tensor

import vit
from vit.kernels.base import OptimizedViT
from vit.kernels.cpu import calibrate, int8
from vit.kernels.cpu.images import batches, photographs
from vit.kernels.cpu.model import CPUViT, missing
from vit.resources import digit_images

needs = pytest.mark.skipif(missing("int8") is not None, reason=f"int8 does not run here: {missing('int8')}")
# A rounding error of float32 may move a number across the edge between two of 255 steps. bfloat16, in which int8 models
# compute attention if the processor can, has coarser steps.
SAME = 0.005
COARSE = 0.05
LOSS = 0.1  # the largest error of int8 in these models
RELATIVES = {
    "plain": {},
    "tanh": {"gelu": "tanh"},
    "layer scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 4, "class_position": False},
    "average": {"global_pool": "avg", "fc_norm": True},
    "no head": {"num_classes": 0},
    "one block": {"depth": 1},
    "other patch and width": {"patch_size": 8, "embed_dim": 96, "num_heads": 3, "mlp_ratio": 2.5},
}


def quantized(plain: vit.ViT) -> OptimizedViT:
    """Calibrated on noise."""
    return vit.kernels.optimize(plain, "int8", images(32, 3, 64, 64, seed=3))


class Twin:
    """What an int8 model computes, from its tensors, by multiplications in float32."""

    def __init__(self, fast: OptimizedViT) -> None:
        self.fast, self.tensors = fast, fast.tensors()

    def layer(self, name: str, x: Tensor) -> Tensor:
        """Round the input, and multiply by the dequantized weight."""
        scale, zero = self.tensors[f"{name}.scale"], self.tensors[f"{name}.zero"]
        x = ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
        weight = self.tensors[f"{name}.weight"].float() * self.tensors[f"{name}.weight_scale"][:, None]
        return F.linear(x, weight, self.tensors[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        """LayerNorm."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.fast.config.eps)

    def features(self, images: Tensor) -> Tensor:
        """[B, T, D], as `forward_features`."""
        config, x = self.fast.config, self.fast.embed(images)
        for i in range(config.depth):
            block = f"blocks.{i}."
            B, T, D = x.shape
            qkv = self.layer(f"{block}attention.qkv", self.norm(f"{block}norm1", x))
            q, k, v = qkv.view(B, T, 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + self.layer(f"{block}attention.proj", (weights @ v).transpose(1, 2).reshape(B, T, D))
            y = self.norm(f"{block}norm2", x)
            for one, two in (("fc1", "fc2"), ("wide1", "wide2")):
                approximate = "none" if config.gelu == "erf" else "tanh"
                hidden = F.gelu(self.layer(f"{block}mlp.{one}", y), approximate=approximate)
                x = x + self.layer(f"{block}mlp.{two}", hidden)
        return self.fast.norm(x)

    def __call__(self, images: Tensor) -> Tensor:
        """As the model."""
        return self.fast.forward_head(self.features(images))


@pytest.fixture
def float32_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors that are slow in bfloat16."""
    monkeypatch.setattr(int8, "multiplies_bfloat16", lambda: False)


def calibrated(plain: vit.ViT) -> dict[str, Tensor]:
    """The tensors of an int8 model, which any processor can compute."""
    return calibrate.int8_tensors(plain, batches(plain, images(32, 3, 64, 64, seed=3)))


@pytest.mark.parametrize("relative", RELATIVES)
@torch.inference_mode()
def test_calibration_keeps_what_a_model_means(relative: str) -> None:
    """By the twin, on any processor; a wrong scale is seen."""
    plain = model(**RELATIVES[relative])
    tensors, x = calibrated(plain), images(2, 3, 64, 64)
    assert difference(Twin(CPUViT(plain.config, "int8", tensors))(x), plain(x)) <= LOSS / 2
    tensors["blocks.0.attention.proj.weight_scale"] *= 2
    assert difference(Twin(CPUViT(plain.config, "int8", tensors))(x), plain(x)) > LOSS / 2


@torch.inference_mode()
def test_v_is_not_smoothed_for_attention_that_may_bend_it() -> None:
    plain = model(depth=1)
    D, bias = plain.config.embed_dim, plain.blocks[0].attention.qkv.bias
    for name, same in (("sdpa", False), (lambda q, k, v, *, bias=None: (v @ v.mT).softmax(-1) @ v, True)):
        plain.set_attention(name)
        found = calibrated(plain)["blocks.0.attention.qkv.bias"]
        assert (difference(found[-D:], bias[-D:]) <= 0.05) == same


def test_attention_that_it_was_not_calibrated_for_is_warned_of() -> None:
    """For functions that compute something else, in either order; not for those that compute the same."""
    plain = model(depth=1)
    with torch.no_grad():
        fast = CPUViT(plain.config, "int8", calibrated(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.set_attention("reference")
    for name in (lambda q, k, v, *, bias=None: v, "sdpa"):
        with pytest.warns(UserWarning, match="calibrated for other attention: set it on the original model"):
            fast.set_attention(name)


@needs
@pytest.mark.usefixtures("float32_attention")
@pytest.mark.parametrize("relative", RELATIVES)
@torch.inference_mode()
def test_int8_is_what_its_twin_says(relative: str) -> None:
    plain = model(**RELATIVES[relative])
    fast = quantized(plain)
    twin = Twin(fast)
    for size in [(64, 64), (16, 16), (112, 48)]:
        x = images(2, 3, *size)
        assert difference(fast.forward_features(x), twin.features(x)) <= SAME
        assert difference(fast(x), twin(x)) <= SAME
        assert difference(fast.forward_features(x), plain.forward_features(x)) <= LOSS  # what rounding costs
    tokens = fast.forward_intermediates(x, [-1], norm=True, return_prefix_tokens=True)[0]
    ours = torch.cat([tokens[1], tokens[0].flatten(2).transpose(1, 2)], dim=1)
    assert difference(ours, fast.forward_features(x)) <= SAME
    mixed = [images(3, 64, 32), images(3, 16, 80)]
    alone = torch.cat([fast(x[None]) for x in mixed])
    assert difference(fast.forward_packed(mixed), alone) <= SAME


@needs
@torch.inference_mode()
def test_attention_in_bfloat16() -> None:
    fast = quantized(model())
    x = images(2, 3, 64, 64)
    assert difference(fast(x), Twin(fast)(x)) <= COARSE


@needs
@pytest.mark.usefixtures("float32_attention")
@pytest.mark.parametrize("part", ["scale", "zero", "weight_scale", "bias", "weight"])
@pytest.mark.parametrize("layer", int8.LAYERS)
@torch.inference_mode()
def test_an_error_in_any_part_would_be_seen(layer: str, part: str) -> None:
    fast = quantized(model())
    twin, x = Twin(fast), images(2, 3, 64, 64)
    assert difference(fast(x), twin(x)) <= SAME
    right = twin.tensors[f"blocks.1.{layer}.{part}"]
    wrong = {
        "scale": lambda: right * 2, "zero": lambda: right * 0 + 230, "weight": lambda: right.flip(0),
        "weight_scale": lambda: right.flip(0), "bias": lambda: right + torch.linspace(-0.3, 0.3, len(right)),
    }  # fmt: skip
    twin.tensors[f"blocks.1.{layer}.{part}"] = wrong[part]()
    assert difference(fast(x), twin(x)) > SAME


@needs
def test_what_runs(capsys: pytest.CaptureFixture) -> None:
    fast = quantized(model())
    ran = operations(lambda: fast(images(2, 3, 64, 64)))
    assert ran["onednn::qlinear_pointwise"] == 6 * 3
    assert not any(name in ran for name in ("aten::gelu", "mkldnn::_linear_pointwise", "aten::int_repr"))
    if int8.multiplies_bfloat16():
        assert {attend.name for attend in fast.attends} == {"bmm"}
        vit.kernels.explain(fast, images(2, 3, 64, 64))
        told = capsys.readouterr().out
        assert "torch.bfloat16 on cpu, without gradients" in told and "blocks 0 to 2: 'bmm': runs" in told
        assert vit.record(fast, images(1, 3, 64, 64), "blocks.1.attention.q").popitem()[1].dtype == torch.bfloat16


@needs
@torch.inference_mode()
def test_digits_keep_their_labels() -> None:
    plain = vit.load_pretrained("vit_digits_patch4_32")
    pictures, labels = digit_images()
    transform = vit.create_transform(plain)
    x = torch.stack([transform(picture) for picture in pictures])
    before = plain(x).argmax(1)
    for calibration in (None, x[:64]):
        after = vit.kernels.optimize(plain, "int8", calibration)(x).argmax(1)
        assert (after == before).float().mean() >= 0.99
        assert (after == labels).sum() >= (before == labels).sum() - 1


@needs
@torch.inference_mode()
def test_wide_channels_and_smoothing_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model()
    plain.blocks[1].mlp.fc1.bias.data[[3, 50]] = 40.0  # two hidden channels that are wide
    plain.blocks[1].norm1.weight.data[5] *= 500  # and one of the stream
    plain.blocks[1].attention.qkv.weight.data[:, 5] /= 500
    x = images(4, 3, 64, 64)
    good = difference(quantized(plain)(x), plain(x))
    order = torch.arange(256)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "argsort", lambda self: order)  # the last 32 channels are set apart instead
        unsorted = difference(quantized(plain)(x), plain(x))
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "smooth", lambda tensors, block, layer, seen: seen)
        rough = difference(quantized(plain)(x), plain(x))
    assert good <= LOSS and unsorted > 2 * good and rough > 2 * good


@needs
@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@torch.inference_mode()
def test_copies(again: Callable[[OptimizedViT], OptimizedViT]) -> None:
    fast = quantized(model())
    x = images(2, 3, 64, 64)
    assert torch.equal(again(fast)(x), fast(x))


@needs
@torch.inference_mode()
def test_saved_small_and_loaded_without_calibrating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model(init_values=0.3, embed_dim=256, num_heads=4)
    fast = quantized(plain)
    file = vit.kernels.save(fast, tmp_path / "fast.safetensors")
    assert sum(x.nbytes for x in fast.blocks[0].tensors().values()) <= 0.3 * sum(
        x.nbytes for x in plain.blocks[0].parameters()
    )
    monkeypatch.setattr(calibrate, "look", None)
    loaded = vit.kernels.load(file)
    x = images(2, 3, 64, 48)
    assert torch.equal(loaded(x), fast(x))
    file.write_bytes(file.read_bytes().replace(b"blocks.0.mlp.wide1.bias", b"blocks.0.mlp.wide3.bias"))
    with pytest.raises(ValueError, match="the file is damaged"):
        vit.kernels.load(file)


@needs
@torch.inference_mode()
def test_looking_inside() -> None:
    plain = model()
    fast = quantized(plain)
    x = images(2, 3, 64, 64)
    for name in ("blocks.1.attention.out", "blocks.1.attention.weights", "blocks.1.mlp", "blocks.2", "norm"):
        ours, theirs = (vit.record(one, x, name)[name] for one in (fast, plain))
        assert difference(ours.float(), theirs) <= LOSS
    for name in ("blocks.1.attention.out", "blocks.1.mlp"):
        with vit.patch(fast, {name: torch.zeros_like}), vit.patch(plain, {name: torch.zeros_like}):
            assert difference(fast(x), plain(x)) <= LOSS


@needs
def test_images_that_do_not_look_normalised_are_warned_of() -> None:
    pixels = torch.rand(40, 3, 64, 64)
    for given, text in ((pixels, "all above their mean"), (255 * pixels - 1, "where pixels range from -1 to 1")):
        with pytest.warns(UserWarning, match=text):
            vit.kernels.optimize(model(), "int8", given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.kernels.optimize(model(), "int8", 2 * pixels - 1)


def bad(change: Callable[[Tensor], object]) -> Tensor:
    """Images to calibrate on, one of which is bad."""
    good = images(32, 3, 64, 64)
    change(good)
    return good


@pytest.mark.filterwarnings("ignore:the images to calibrate on range from")
@needs
@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        (images(31, 3, 64, 64), "expected 32 to 512 images to calibrate on, not 31"),
        ([], "expected 32 to 512 images to calibrate on, not 0"),
        (bad(lambda x: x[7, 0, 3, 3].fill_(torch.nan)), "image 7 to calibrate on has values that are not finite"),
        (bad(lambda x: x[9].fill_(0.5)), "image 9 to calibrate on is constant"),
        ([*images(40, 3, 64, 64), images(3, 60, 64)], "image 40 to calibrate on: .*multiple"),
        (images(32, 1, 64, 64), "image 0 to calibrate on: .*channels"),
        ([(images(3, 64, 64), 1)] * 40, r"list of tensors \[C, H, W\] to calibrate on, not a list with tuple"),
        (40, "to calibrate on, not int"),
        (images(3, 64, 64), r"to calibrate on, not a tensor \[3, 64, 64\]"),
        (1e30 * images(40, 3, 64, 64), "give blocks.* values that are not finite: normalise them"),
    ],
)
def test_bad_images_to_calibrate_on(calibration: Tensor | list[Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        vit.kernels.optimize(model(), "int8", calibration)


@needs
@torch.inference_mode()
def test_images_of_several_sizes_calibrate() -> None:
    plain = model()
    given = [*images(20, 3, 64, 64, seed=1), *images(20, 3, 32, 96, seed=2)]
    x = images(2, 3, 64, 64)
    assert difference(vit.kernels.optimize(plain, "int8", given)(x), plain(x)) <= LOSS


def test_photographs_that_ship() -> None:
    x = photographs(model(), each=5)
    assert x.shape == (35, 3, 64, 64) and torch.equal(x, photographs(model(), each=5))
    assert len({round(one.mean().item(), 4) for one in x}) == 35
    with pytest.raises(ValueError, match="1 or 3 channels, and the model takes 5: calibrate on images of your own"):
        photographs(model(in_chans=5))


def test_a_processor_without_vnni_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match=r"cannot run int8: its processor lacks VNNI.*: use float32"):
        vit.kernels.optimize(model(), "int8")


@needs
@torch.inference_mode()
@pytest.mark.usefixtures("float32_attention")
def test_without_bfloat16_attention_is_in_float32() -> None:
    fast = quantized(model())
    x = images(2, 3, 64, 64)
    assert {attend.name for attend in fast.attends} == {"sdpa"}
    assert vit.record(fast, x, "blocks.1.attention.q").popitem()[1].dtype == torch.float32
    assert difference(fast(x), Twin(fast)(x)) <= SAME
