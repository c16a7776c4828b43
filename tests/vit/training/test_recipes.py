"""Recipes, learning rates as an optimizer sees them, and what is trained."""

import math

import pytest
import timm
import torch
from helpers import MINI, images, randomize
from timm.optim import create_optimizer_v2
from torch import nn

import vit
from vit.training import RECIPES, Recipe, learning_rate, parameter_groups
from vit.training.recipes import make_optimizer, prepare, set_rates

CONFIG = MINI.override(init_values=0.1, reg_tokens=2, depth=3)


def model() -> vit.ViT:
    return randomize(vit.ViT(CONFIG))


def test_the_rates_are_those_of_the_updates():
    """One step of SGD, under a PyTorch scheduler, moves each layer by its own rate times its gradient."""
    ours = model()
    optimizer = torch.optim.SGD(parameter_groups(ours, lr=0.1, weight_decay=0.0, layer_decay=0.5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.3)
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    ours(images(2, 3, 56, 56)).square().sum().backward()
    optimizer.step()
    layers = {
        "head.weight": 0, "norm.weight": 1, "blocks.2.mlp.fc1.weight": 1, "blocks.0.scale1": 3, "class_token": 4,
        "register_tokens": 4, "position_embedding": 4, "patch_embed.proj.weight": 4,
    }  # fmt: skip
    for name, layers_below in layers.items():
        parameter = ours.get_parameter(name)
        moved = (before[name] - parameter).norm() / parameter.grad.norm()
        assert moved.item() == pytest.approx(0.3 * 0.1 * 0.5**layers_below, rel=1e-3), name
    scheduler.step()


def test_timms_own_groups_have_no_effect_in_a_plain_optimizer():
    """The control: `lr_scale` is read by timm's schedulers alone (timm#2532), so each group has the same rate."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=3)
    groups = create_optimizer_v2(theirs, opt="adamw", lr=0.1, layer_decay=0.5).param_groups
    assert {group["lr"] for group in groups} == {0.1} and len({group["lr_scale"] for group in groups}) > 1


def test_no_decay_for_vectors_tokens_and_positions():
    ours = model()
    groups = parameter_groups(ours, lr=1.0, weight_decay=0.3)
    without = {name for group in groups if group["weight_decay"] == 0.0 for name in group["names"]}
    decayed = {name for group in groups if group["weight_decay"] == 0.3 for name in group["names"]}
    assert without | decayed == {name for name, _ in ours.named_parameters()}
    assert decayed == {
        name for name, parameter in ours.named_parameters()
        if parameter.ndim >= 2 and not name.endswith(("token", "tokens", "embedding"))
    }  # fmt: skip


def test_the_schedule_rises_and_falls():
    shares = [learning_rate(step, 20, 4) for step in range(20)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[4:] == sorted(shares[4:], reverse=True) and 0 < shares[-1] < 0.02
    assert shares[12] == pytest.approx((1 + math.cos(math.pi * 8 / 16)) / 2)
    assert learning_rate(0, 1) == 1.0


def test_frozen_parts_need_no_gradient():
    ours = model()
    prepare(ours, Recipe(freeze=2))
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in ours.named_parameters() if name.startswith(("blocks.2", "norm", "head"))}
    prepare(ours, Recipe(freeze=-1))
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    prepare(ours, Recipe())  # what the caller has frozen stays so
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_drop_path_is_set_as_the_config_would_set_it():
    ours, fresh = model(), vit.ViT(CONFIG.override(drop_path_rate=0.3))
    prepare(ours, Recipe(drop_path=0.3))
    assert ours.config.drop_path_rate == 0.3
    for one, two in zip(ours.blocks, fresh.blocks):
        assert one.residual_attention.drop_path_rate == two.residual_attention.drop_path_rate
        assert one.residual_mlp.drop_path_rate == two.residual_mlp.drop_path_rate


def test_rates_are_set_from_the_highest():
    optimizer = make_optimizer(model(), Recipe(lr=0.2, layer_decay=0.5))
    set_rates(optimizer, 0.1)
    set_rates(optimizer, 0.5)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(0.1)
    assert min(group["lr"] for group in optimizer.param_groups) == pytest.approx(0.1 * 0.5**4)


def test_the_recipes_are_those_of_their_sources():
    augreg, mae = RECIPES["augreg"], RECIPES["mae"]
    assert (augreg.opt, augreg.momentum, augreg.weight_decay, augreg.clip_grad) == ("sgd", 0.9, 0.0, 1.0)
    assert (augreg.batch_size, augreg.steps, augreg.warmup_steps, augreg.scale) == (512, 500, 100, 0.05)
    assert mae.lr == 5e-4 * mae.batch_size / 256 and (mae.layer_decay, mae.drop_path, mae.mixup) == (0.65, 0.1, 0.8)


@pytest.mark.parametrize(
    "values, text",
    [
        ({"opt": "adam"}, "unknown opt 'adam'. Did you mean 'adamw'?"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps must be below steps, 10, not 10"),
        ({"batch_size": 10, "grad_accum_steps": 3}, "batch_size 10 is not a multiple of grad_accum_steps 3"),
        ({"smoothing": 1.0}, "smoothing must lie in"),
        ({"freeze": -2}, "freeze must be a whole number of at least -1"),
        ({"amp": "fp16"}, "unknown amp 'fp16'"),
        ({"steps": 2.5}, "steps must be a whole number"),
    ],
)
def test_recipes_that_make_no_sense(values, text):
    with pytest.raises(ValueError) as caught:
        Recipe(**values)
    assert text in str(caught.value)


def test_what_is_for_a_vit_alone():
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layer_decay is for a vit.ViT: give Linear layer_decay=1.0"):
        parameter_groups(other, 0.1, layer_decay=0.5)
    with pytest.raises(ValueError, match="drop_path and freeze are for a vit.ViT, not for Linear"):
        prepare(other, Recipe(freeze=1))
    with pytest.raises(ValueError, match="freeze=4 is more than the model's 3 blocks"):
        prepare(model(), Recipe(freeze=4))
    with pytest.raises(ValueError, match="nothing is trained"):
        parameter_groups(other.requires_grad_(False), 0.1)
