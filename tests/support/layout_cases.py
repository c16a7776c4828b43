"""Each layout, and a model of its own library in it: random weights, made there and read here, and the reverse.

`python tests/reports/layout_table.py` prints the differences; `tests/weights/test_layouts.py` checks them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from helpers import difference, images, randomize
from peers import build_peer, timm_model
from torch import Tensor, nn

import vit
from vit.config import ViTConfig
from vit.weights.layouts import LAYOUTS
from vit.weights.reading import to_ours

BASE = ViTConfig(img_size=64, num_classes=11)  # ViT-S/16, on a small grid


@dataclass(frozen=True)
class Case:
    """One model in one layout."""

    layout: str
    peer: str  # the model that proves it
    config: ViTConfig
    make: Callable[[ViTConfig], tuple[nn.Module, Callable[[Tensor], Tensor]]]  # their model and its forward
    theirs: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = (
        dict  # their state dict, as the layout's files have it
    )

    @property
    def id(self) -> str:
        return f"{self.layout}: {self.peer}"


def _timm(config: ViTConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = timm_model(config)
    return model, model if config.num_classes else model.forward_features


def _torchvision(config: ViTConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from torchvision.models import VisionTransformer

    c = config
    model = VisionTransformer(
        c.img_size[0], c.patch_size, c.depth, c.num_heads, c.embed_dim, c.mlp_dim, num_classes=c.num_classes
    )
    return model, model


def _transformers(name: str, **extra: object) -> Callable[[ViTConfig], tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """A class of transformers', configured by its own names."""

    def make(config: ViTConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        import transformers

        kind = getattr(transformers, name)
        settings = {
            "hidden_size": config.embed_dim, "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads,
            "image_size": config.img_size[0], "patch_size": config.patch_size, "layer_norm_eps": config.eps,
            "num_labels": config.num_classes,
        }  # fmt: skip
        if not name.startswith("Dinov2"):
            settings["intermediate_size"] = config.mlp_dim
        if config.reg_tokens:
            settings["num_register_tokens"] = config.reg_tokens
        model = kind(kind.config_class(**settings), **extra)
        key = "logits" if config.num_classes else "last_hidden_state"
        return model, lambda x: getattr(model(x), key)

    return make


def on_disk(state: Mapping[str, Tensor], make: Callable, config: ViTConfig) -> dict[str, Tensor]:
    """What transformers' `save_pretrained` writes for weights that have other names in memory."""
    from safetensors.torch import load_file

    model, _ = make(config)
    model.load_state_dict(dict(state))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _rename(*pairs: tuple[str, str]) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for key, tensor in state.items():
            for old, new in pairs:
                key = key.replace(old, new)
            result[key] = tensor
        return result

    return rename


def _wrap(prefix: str, *others: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Each key behind a prefix, and the keys that a training script leaves beside the model."""
    beside = {name: torch.ones(3, 3) for name in others}
    return lambda state: {prefix + key: tensor for key, tensor in state.items()} | beside


def _dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(state) | {"mask_token": torch.ones(1, state["cls_token"].shape[-1])}


def _cases() -> list[Case]:
    bare = BASE.override(num_classes=0)
    scaled = BASE.override(init_values=0.5)
    dist = BASE.override(dist_token=True, global_pool="dist")
    cases = [
        Case("timm", "timm ViT", BASE, _timm),
        Case("timm", "timm ViT without a head", bare, _timm),
        Case("timm", "timm ViT, norm after pooling", BASE.override(global_pool="avg", fc_norm=True), _timm),
        Case("deit", "timm DeiT, distilled", dist, _timm),
        Case("deit3", "timm DeiT-III", scaled.override(class_position=False), _timm,
             _rename(("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))),
        Case("dino", "timm ViT", bare, _timm,
             _wrap("teacher.backbone.", "teacher.head.mlp.0.weight", "teacher.head.last_layer.weight_v", "epoch.x")),
        Case("mae", "timm ViT", bare, _timm, _wrap("", "mask_token", "decoder_pos_embed", "decoder_blocks.0.x")),
        Case("moco", "timm ViT", bare.override(num_heads=12), _timm,
             _wrap("module.base_encoder.", "module.base_encoder.head.0.weight", "module.predictor.0.weight",
                   "module.momentum_encoder.cls_token")),
        Case("dinov2", "timm DINOv2", bare.override(init_values=0.5), _timm, _dinov2),
    ]  # fmt: skip
    kinds = [
        ("transformers", "ViTForImageClassification", BASE, {}),
        ("transformers", "ViTModel", bare, {"add_pooling_layer": False}),
        ("transformers_deit", "DeiTForImageClassificationWithTeacher", dist, {}),
        ("transformers_deit_plain", "DeiTForImageClassification", BASE.override(dist_token=True), {}),
        ("transformers_dinov2", "Dinov2ForImageClassification", scaled.override(global_pool="token_avg"), {}),
        ("transformers_dinov2", "Dinov2Model", scaled.override(num_classes=0), {}),
        ("transformers_dinov2_registers", "Dinov2WithRegistersForImageClassification",
         scaled.override(global_pool="token_avg", reg_tokens=3), {}),
        ("transformers_dinov2_registers", "Dinov2WithRegistersModel",
         scaled.override(num_classes=0, reg_tokens=3), {}),
    ]  # fmt: skip
    for layout, name, config, extra in kinds:
        make = _transformers(name, **extra)
        cases.append(Case(layout, f"transformers {name}", config, make, partial(on_disk, make=make, config=config)))
        cases.append(Case(f"{layout}_memory", f"transformers {name}", config, make))
    old = _rename((".mlp.0.", ".mlp.linear_1."), (".mlp.3.", ".mlp.linear_2."))
    cases += [
        Case("torchvision", "torchvision VisionTransformer", BASE, _torchvision),
        Case("torchvision_old", "torchvision VisionTransformer", BASE, _torchvision, old),
    ]
    return cases


CASES = _cases()

# Layouts that only a loader of another library proves: timm reads what we write.
WRITTEN_ONLY = [
    ("dinov2", "timm DINOv2 with registers", BASE.override(num_classes=0, init_values=0.5, reg_tokens=3)),
    ("augreg", "timm's npz loader", BASE),
    ("big_vision", "timm's npz loader", BASE),
    ("big_vision_scanned", "timm's npz loader", BASE),
]


def case_config(case: Case, depth: int, img_size: int = 64) -> Case:
    """The same case with another number of blocks and another size."""
    config = case.config.override(depth=depth, img_size=img_size)
    theirs = case.theirs
    if isinstance(theirs, partial):
        theirs = partial(theirs.func, make=case.make, config=config)
    return Case(case.layout, case.peer, config, case.make, theirs)


def read_theirs(case: Case, gradients: bool = False) -> tuple[float, float]:
    """Their model with random weights, read here: the difference of outputs and the largest of any gradient's."""
    model, forward = case.make(case.config)
    randomize(model).eval()
    stated = {"num_heads": case.config.num_heads, "eps": case.config.eps}
    state = case.theirs(model.state_dict())
    ours = to_ours(state, None, {"the caller": stated})
    assert ours.layout.name == case.layout, (ours.layout.name, case.layout)
    assert ours.config == case.config.override(
        init_values=ours.config.init_values, position_rule=ours.config.position_rule
    )
    mine = vit.ViT(ours.config).eval()
    mine.load_state_dict(ours.tensors)
    x, y = (images(2, 3, *case.config.img_size).requires_grad_() for _ in range(2))
    out = mine(x) if case.config.num_classes else mine.forward_features(x)
    their_out = forward(y)
    worst = 0.0
    if gradients:
        weights = images(*out.shape, seed=5)
        (out * weights).sum().backward()
        (their_out * weights).sum().backward()
        unused = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.grad is None}
        state = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | unused
        theirs = to_ours(_gradients(case, state), None, {"the caller": stated}).tensors
        worst = max(difference(p.grad, theirs[name]) for name, p in mine.named_parameters())
        worst = max(worst, difference(x.grad, y.grad))
    return difference(out.detach(), their_out.detach()), worst


def _gradients(case: Case, gradients: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Gradients in the names of the layout's files; converting is linear and so serves them as well as weights."""
    return case.theirs(gradients)


@torch.no_grad()
def written_to_them(layout: str, config: ViTConfig) -> float:
    """Our model with random weights, written in a layout and run in its own library: the difference of outputs."""
    mine = randomize(vit.ViT(config)).eval()
    converted = vit.weights.convert(mine.state_dict(), "vit", layout, config)
    x = images(2, 3, *config.img_size)
    out = mine(x) if config.num_classes else mine.forward_features(x)
    return difference(out, build_peer(layout, converted.state_dict, converted.config)(x))


assert {case.layout for case in CASES} | {layout for layout, _, _ in WRITTEN_ONLY} | {"vit"} == set(LAYOUTS)
