"""What timm's optimizer factory makes of our model: the groups that it makes of its own."""

import pytest
import timm.optim
import torch
from helpers import MINI, difference, images, timm_twin
from timm.models import group_parameters

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
