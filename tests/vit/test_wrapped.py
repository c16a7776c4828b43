"""Models whose first layer is sharded, offloaded, adapted, quantised or cast by somebody else's code."""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FLOAT32, MINI, difference, images, randomize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import vit


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def make() -> vit.ViT:
    return randomize(vit.ViT(MINI)).eval()


SHARDED: dict[str, Callable[[vit.ViT], list[nn.Module]]] = {
    "the model": lambda m: [],
    "its blocks": lambda m: list(m.blocks),
    "its embedding": lambda m: [m.patch_embed, *m.blocks],
    "its convolution": lambda m: [m.patch_embed.proj],
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("parts", SHARDED)
@pytest.mark.filterwarnings("ignore:.*returned a view tensor")  # which nothing here changes in place
def test_a_sharded_model_runs(group, parts, dtype):
    model, x = make(), images(2, 3, 56, 40)
    expected = model(x)
    mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=True)
    for part in [*SHARDED[parts](model), model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for _ in range(2):  # the second time, what was gathered has been given back
        found = model(x)
        assert found.dtype == (dtype or torch.float32)
        assert difference(found.float(), expected) <= (FLOAT32 if dtype is None else 0.05)
    found.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_shards_are_gathered_and_saved(group, tmp_path):
    sharded = make()
    expected = {name: value.clone() for name, value in sharded.state_dict().items()}
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    saved = vit.load_pretrained(vit.save_checkpoint(sharded, tmp_path / "m")).state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    parallel = DistributedDataParallel(make())
    with pytest.raises(ValueError, match=r"got DistributedDataParallel: save the model in it, its \.module$"):
        vit.save_checkpoint(parallel, tmp_path / "m")


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.filterwarnings("ignore")  # PyTorch's, for a device without a context, and for one process
def test_a_sharded_embedding_runs(group, original):
    model, x = make(), images(2, 3, 56, 40)
    expected = model(x)
    options = {"device_id": torch.device("cpu"), "use_orig_params": original}
    options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16)
    model.patch_embed = FullyShardedDataParallel(model.patch_embed, **options)
    found = FullyShardedDataParallel(model, **options)(x)
    assert found.dtype == torch.bfloat16 and difference(found.float(), expected) <= 0.05


def offloaded(model: vit.ViT) -> None:
    """Weights on the meta device, except while the layer runs."""
    for module in list(model.modules()):
        if own := dict(module.named_parameters(recurse=False)):
            stored = {name: p.detach().clone() for name, p in own.items()}
            module.register_forward_pre_hook(lambda module, _, stored=stored: put(module, stored))
            module.register_forward_hook(lambda module, *_: put(module, module._parameters, "meta"))
            put(module, own, "meta")


def put(module: nn.Module, tensors: dict[str, Tensor], device: str = "cpu") -> None:
    for name, tensor in list(tensors.items()):
        if tensor is not None:
            module._parameters[name] = nn.Parameter(tensor.to(device))


def offloaded_by_accelerate(model: vit.ViT) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def stored_in_half(model: vit.ViT) -> None:
    """As diffusers' layerwise casting: small in memory, wide while it runs."""
    proj = model.patch_embed.proj.to(torch.bfloat16)
    proj.register_forward_pre_hook(lambda module, _: module.float() and None)
    proj.register_forward_hook(lambda module, *_: module.bfloat16() and None)


def computing_in_half(model: vit.ViT) -> None:
    proj = model.patch_embed.proj.to(torch.bfloat16)
    proj.forward = lambda x: type(proj).forward(proj, x.bfloat16()).float()


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.bfloat16().float()


class Adapted(nn.Module):
    """The convolution and something of low rank beside it, with no weight of its own."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = layer
        self.down, self.up = nn.Conv2d(3, 2, 4, 4), nn.Conv2d(2, MINI.embed_dim, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Quantised(nn.Module):
    """Whole numbers and a scale; `weight` is a method, as in PyTorch's own quantised layers."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("packed", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("bias", layer.bias.detach())

    def weight(self) -> Tensor:
        return self.packed * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, stride=4)


class QuantisedAttribute(Quantised):
    weight = property(lambda self: self.packed)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.packed * self.scale, self.bias, stride=4)


def replaced(make: Callable[[nn.Module], nn.Module]) -> Callable[[vit.ViT], None]:
    return lambda model: setattr(model.patch_embed, "proj", make(model.patch_embed.proj))


CHANGED = {
    "offloaded": offloaded,
    "offloaded by accelerate": offloaded_by_accelerate,
    "stored in half": stored_in_half,
    "computing in half": computing_in_half,
    "parametrized": lambda model: parametrize.register_parametrization(model.patch_embed.proj, "weight", Halved()),
    "adapted": replaced(Adapted),
    "quantised": replaced(Quantised),
    "quantised, an attribute": replaced(QuantisedAttribute),
    "compiled": replaced(lambda layer: torch.compile(layer, backend="eager")),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGED)
def test_the_first_layer_decides_what_it_takes(change):
    model, x = make(), images(2, 3, 56, 40)
    expected = model(x)
    CHANGED[change](model)
    for _ in range(2):
        assert difference(model(x), expected) <= 0.05
    if not model.class_token.is_meta:  # a method other than `forward` runs no hooks of the model itself
        assert difference(model.forward_packed(list(x)), expected) <= 0.05
    with pytest.raises(ValueError, match="1 in place of 3 channels"):  # what does not depend on it is still checked
        model(images(1, 1, 56, 56))


def test_attention_of_a_quantised_model_keeps_its_dtype(registered):
    """It takes the tokens' dtype, not that of the weights of the first layer."""

    class Warm(nn.Module):
        def __init__(self, config, block):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, q, k, v, *, bias=None):
            return vit.attention.sdpa(q * self.scale, k, v, bias=bias)

    for layer in (Quantised, QuantisedAttribute, Adapted):
        model = make()
        replaced(layer)(model)
        model.set_attention(registered("warm", Warm))
        assert model.attends[0].fn.scale.item() == 1.5


def test_graphs_of_modules_say_what_to_use_instead():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    for call in (
        lambda: torch.fx.symbolic_trace(make()),
        lambda: feature_extraction.create_feature_extractor(make(), ["blocks.0"]),
        lambda: feature_extraction.get_graph_node_names(vit.FeaturePyramid(make())),
    ):
        with pytest.raises(ValueError, match=r"torch\.fx cannot .* model\.forward_intermediates .* torch\.export"):
            call()


def test_transformers_trainer_takes_the_readmes_wrapper(tmp_path):
    """The wrapper as vit/README.md shows it; the model learns, is evaluated, saved and found again."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    page = (Path(__file__).parents[2] / "vit" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(class ForTrainer.*?)^```$", page, re.S | re.M)
    exec(code, names := {"torch": torch, "vit": vit})
    labels = [i % 2 for i in range(32)]
    items = [{"pixel_values": images(3, 32, 32, seed=i) + 2 * label, "labels": label} for i, label in enumerate(labels)]
    torch.manual_seed(0)
    model = vit.ViT(vit.ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2))
    trainer = Trainer(
        model=names["ForTrainer"](model),
        args=TrainingArguments(
            tmp_path, num_train_epochs=6, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], use_cpu=True,
            logging_strategy="no", save_strategy="epoch",
        ),
        train_dataset=items,
        eval_dataset=items,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] >= 0.9
    again = vit.load_pretrained(vit.save_checkpoint(trainer.model.model, tmp_path / "model"))
    x = torch.stack([item["pixel_values"] for item in items])
    assert torch.equal(again(x), model.eval()(x))
