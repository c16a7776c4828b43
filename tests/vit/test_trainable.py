"""What timm's optimizer factory makes of our model: the groups that it makes of its own."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm.optim
import torch
import torch.distributed as dist
from helpers import MINI, difference, images, randomize, timm_twin
from timm.models import group_modules, group_parameters
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vit
from vit.trainable import decays, layer_of

RELATIVES = {
    "plain": MINI,
    "registers": MINI.override(reg_tokens=3, class_position=False),
    "distillation token": MINI.override(dist_token=True, global_pool="dist"),
    "layer scale": MINI.override(init_values=0.5, depth=3),
    "norm after pooling": MINI.override(global_pool="avg", fc_norm=True),
    "no head": MINI.override(num_classes=0),
    "norm after pooling, no head": MINI.override(global_pool="avg", fc_norm=True, num_classes=0),
    "twelve blocks": MINI.override(depth=12),  # blocks.1 and blocks.11 start alike
}


def pair(name: str) -> tuple[torch.nn.Module, vit.ViT]:
    """timm's model and ours, with the same weights."""
    config = RELATIVES[name]
    twin, ours = timm_twin(config), vit.ViT(config)
    layout = "deit" if config.dist_token else "timm"
    ours.load_state_dict(vit.weights.convert(twin.state_dict(), layout, "vit", config).state_dict)
    return twin, ours


def groups(model: torch.nn.Module, options: dict[str, object]) -> list[tuple[object, ...]]:
    """(lr_scale, weight decay) of every parameter, and the sum of its values, which are equal in both models."""
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, **options)
    return sorted(
        (group.get("lr_scale"), group["weight_decay"], list(p.shape), p.double().sum().item())
        for group in optimizer.param_groups
        for p in group["params"]
    )


@pytest.mark.parametrize("options", [{"layer_decay": 0.75}, {"layer_decay": 0.5, "layer_decay_min_scale": 0.2}])
@pytest.mark.parametrize("name", RELATIVES)
def test_timm_makes_the_groups_of_its_own_model(name, options):
    twin, ours = pair(name)
    expected = groups(twin, options)
    assert groups(ours, options) == expected
    assert len({scale for scale, *_ in expected}) > 2  # the control: layers differ
    for p in [*twin.patch_embed.parameters(), *ours.patch_embed.parameters()]:  # frozen ones are left out
        p.requires_grad_(False)
    assert groups(ours, options) == groups(twin, options) != expected


@pytest.mark.parametrize("name", RELATIVES)
def test_weight_decay_without_layers(name):
    """Without layer_decay, too, timm leaves the tokens and positions out."""
    twin, ours = pair(name)
    found = [[(d, shape, x) for _, d, shape, x in groups(model, {})] for model in (ours, twin)]
    assert found[0] == found[1]
    ours.no_weight_decay = set
    assert [(d, shape, x) for _, d, shape, x in groups(ours, {})] != found[1]


@pytest.mark.parametrize("name", RELATIVES)
def test_timm_groups_modules_as_its_own(name):
    """As many parameters in every layer, found by the names of their modules."""
    ours, theirs = (
        {
            layer: sum(p.numel() for module in modules for p in module.parameters(recurse=False))
            for layer, modules in group_modules(model, model.group_matcher(), return_values=True).items()
        }
        for model in pair(name)[::-1]
    )
    assert ours == theirs


@pytest.mark.parametrize("name", RELATIVES)
def test_the_rule_and_its_patterns_agree(name):
    model = vit.ViT(RELATIVES[name].override(dist_token=True, reg_tokens=2, init_values=0.1))
    found = group_parameters(model, model.group_matcher(), reverse=True)
    assert found == {name: layer_of(name, model.config.depth) for name, _ in model.named_parameters()}
    flat = {name for name, p in model.named_parameters() if p.ndim == 1} | model.no_weight_decay()
    assert flat == {name for name, p in model.named_parameters() if not decays(name, p)}


def test_attention_with_weights_of_its_own_is_a_part_of_its_block(registered):
    class Warm(torch.nn.Module):
        def __init__(self, config, block):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(config.num_heads, 1, 1))

        def forward(self, q, k, v, *, bias=None):
            return vit.attention.sdpa(q * self.scale, k, v, bias=bias)

    model = vit.ViT(MINI)
    model.set_attention(registered("warm", Warm))
    optimizer = timm.optim.create_optimizer_v2(model, lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert [scales[id(attend.fn.scale)] for attend in model.attends] == [0.25, 0.5]


def test_the_classifier_is_found():
    model = vit.ViT(MINI)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    distilled = vit.ViT(MINI.override(dist_token=True, global_pool="dist"))
    assert distilled.get_classifier() == (distilled.head, distilled.head_dist)


def test_gradient_checkpointing_is_set_on_a_model(monkeypatch):
    calls = []
    checkpoint = vit.model.checkpoint
    monkeypatch.setattr(vit.model, "checkpoint", lambda *args, **more: calls.append(1) or checkpoint(*args, **more))
    model, x = vit.ViT(MINI), images(2, 3, 56, 40)
    expected = model(x)
    model.set_grad_checkpointing()
    assert model.config.grad_checkpointing and difference(model(x), expected) == 0 and len(calls) == MINI.depth
    model.set_grad_checkpointing(False)
    assert model.config == MINI and difference(model(x), expected) == 0 and len(calls) == MINI.depth


class Built(nn.Module):
    """What somebody builds on features: `forward` is what DistributedDataParallel calls."""

    def __init__(self, model: vit.ViT, features: Callable[[vit.ViT, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, x: Tensor) -> Tensor:
        return sum(one.square().sum() for one in self.features(self.model, x))


BUILT: dict[str, tuple[Callable[[vit.ViT], vit.ViT], Callable[[vit.ViT, Tensor], Any]]] = {
    "features": (lambda m: m.backbone(), lambda m, x: m.forward_features(x)),
    "features, packed": (lambda m: m.backbone(), lambda m, x: m.forward_features_packed(list(x))),
    "normed maps": (lambda m: m.backbone(), lambda m, x: m.forward_intermediates(x, [0, -1], norm=True)),
    "maps": (lambda m: m.backbone(norm=False), lambda m, x: m.forward_intermediates(x, [0, -1])),
    "an early map": (lambda m: m.backbone([1, 0], norm=False), lambda m, x: m.forward_intermediates(x, [1, 0])),
    "maps, packed": (lambda m: m.backbone(), lambda m, x: m.forward_intermediates_packed(list(x), [2], norm=True)[0]),
    "a masked average": (lambda m: m.backbone(), lambda m, x: m.forward_features(x)[:, ::2].mean(dim=1)),
}
HEADED = {
    "head": MINI.override(depth=3),
    "two heads": MINI.override(depth=3, dist_token=True, global_pool="dist"),
    "norm after pooling": MINI.override(depth=3, global_pool="avg", fc_norm=True),
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, for DistributedDataParallel."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(module: nn.Module, x: Tensor) -> Tensor:
    """Two steps; DistributedDataParallel stops at the second one if a parameter got no gradient at the first."""
    parallel = DistributedDataParallel(module)
    for _ in range(2):
        loss = parallel(x)
        loss = loss if isinstance(loss, Tensor) else sum(one.square().sum() for one in loss.values())
        loss.square().sum().backward()
    return loss


@pytest.mark.parametrize("config", HEADED)
@pytest.mark.parametrize("name", BUILT)
def test_a_backbone_trains_in_parallel(group, name, config):
    (make, features), model, x = BUILT[name], randomize(vit.ViT(HEADED[config])), images(2, 3, 56, 40)
    before = copy.deepcopy(model)
    expected = Built(before, features)(x)
    assert torch.equal(train(Built(make(model), features), x), expected)
    owned = {id(p) for p in make(model).parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == owned  # the weights are shared
    assert model.config == before.config and torch.equal(model(x), before(x))  # and the model is as it was
    with pytest.raises(RuntimeError, match="did not receive grad"):  # the control: with its head
        train(Built(before, features), x)


@pytest.mark.parametrize("config", HEADED)
def test_models_train_in_parallel(group, config):
    """Logits and pooled features use every weight; so does the pyramid, of what it owns."""
    model, x = randomize(vit.ViT(HEADED[config])), images(2, 3, 56, 40)
    pyramid = vit.FeaturePyramid(model, out_channels=4)
    train(model, x)
    train(pyramid, x)
    model.reset_classifier(0)
    train(model, x)


def test_a_backbone_is_a_model_of_its_own(registered):
    model = randomize(vit.ViT(MINI.override(depth=3, drop_path_rate=0.4)))
    model.categories = list("abcde")
    early = model.backbone([0, 1])
    assert early.config == model.config.override(depth=2, num_classes=0, drop_path_rate=0.2)
    rates = [block.residual_mlp.drop_path_rate for block in vit.ViT(early.config).blocks]
    assert [block.residual_mlp.drop_path_rate for block in early.blocks] == rates == [0.0, 0.2]
    early.register_forward_hook(lambda *_: 1 / 0)
    early.train().set_grad_checkpointing()
    assert not model.config.grad_checkpointing and model.categories == list("abcde")
    model.eval()(images(1, 3, 56, 56))
    with pytest.raises(ValueError, match="block 3 is out of range"):
        model.backbone([3])
    with torch.no_grad():
        whole, x = model.backbone(), images(1, 3, 56, 40)
        assert torch.equal(whole.forward_features(x), model.forward_features(x))
        assert torch.equal(copy.deepcopy(whole)(x), model.forward_head(model.forward_features(x), pre_logits=True))
        model.patch_embed.proj.weight.mul_(1.5)
        assert torch.equal(whole.forward_features(x), model.forward_features(x))


@torch.no_grad()
def test_a_backbone_without_a_norm_says_so(tmp_path):
    """An identity in its place would give other features in silence."""
    pooled = randomize(vit.ViT(MINI.override(global_pool="avg", fc_norm=True))).eval()
    x = images(1, 3, 56, 56)
    with pytest.raises(ValueError, match="this backbone has no norm of pooled features: call forward_features"):
        pooled.backbone()(x)
    plain = randomize(vit.ViT(MINI)).eval()
    with pytest.raises(ValueError, match=r"this backbone has no final norm: make it with backbone\(norm=True\)"):
        plain.backbone(norm=False).forward_features(x)
    assert torch.equal(plain.backbone()(x), plain.forward_head(plain.forward_features(x), pre_logits=True))
    for backbone in (pooled.backbone(), plain.backbone(norm=False)):
        with pytest.raises(ValueError, match="got a backbone without its norm: save the model whose weights it shares"):
            vit.save_checkpoint(backbone, tmp_path / "m")
        with pytest.raises(ValueError, match="got a backbone without its norm: optimize the model"):
            vit.kernels.optimize(backbone)
    vit.save_checkpoint(plain.backbone(), tmp_path / "m")


@torch.no_grad()
def test_images_of_another_dtype_meet_a_clear_error_under_functional_call():
    model = vit.ViT(MINI)
    weights = {name: parameter.double() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"use images.to\(torch.float64\)"):
        torch.func.functional_call(model, weights, (images(1, 3, 56, 56),))
