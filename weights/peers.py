"""Other people's models, built around a checkpoint to hold ours against; nothing else imports their libraries.

`vit convert --check` runs them where they are installed, and so do the tests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit.config import ViTConfig
from vit.metadata import Preprocessing

from .checkpoint import CheckpointError
from .description import Attributes
from .formats.npz import write_npz
from .layouts import get_layout, transformers_config


class NoPeer(CheckpointError):
    """No other library is there to run a layout in."""


Forward = Callable[[Tensor], Tensor]  # images -> logits, or tokens after the final norm where there is no head


def peer_library(layout: str) -> str:
    """The library whose model reads a layout; timm reads those of Google's and Meta's projects as well."""
    return (
        "torchvision"
        if layout.startswith("torchvision")
        else layout.split("_")[0]
        if "transformers" in layout
        else "timm"
    )


def build_peer(layout: str, state: Mapping[str, Tensor], config: ViTConfig, folder: Path | None = None) -> Forward:
    """The forward pass of a layout's own library around a state dict in that layout.

    Args:
        layout: its name.
        state: every weight of the model, under the layout's names without a wrapper.
        config: of the model.
        folder: where timm's or transformers' own files lie, to be loaded by their own loaders; None builds the model
            from `config`.

    Raises:
        NoPeer: the library is not installed, or none is known.
        CheckpointError: the library does not take the weights.
    """
    library = peer_library(layout)
    if layout == "vit":
        raise NoPeer("no other library reads the vit layout, this project's own")
    build = {"timm": _timm, "transformers": _transformers, "torchvision": _torchvision}[library]
    try:
        return build(layout, dict(state) | _zeros(layout, state, config), config, folder)
    except CheckpointError:
        raise
    except ModuleNotFoundError as error:  # the library, or one that it needs
        name = (error.name or library).partition(".")[0]
        raise NoPeer(f"--check needs {name}: pip install {name}") from None
    except Exception as error:  # each library has its own way of not loading something
        raise CheckpointError(f"{library} cannot load this: {str(error).splitlines()[0]}") from None


def _zeros(layout: str, state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """What the layout's files have and this project drops, as zeros."""
    one, dtype = get_layout(layout), next(iter(state.values())).dtype
    front = one.prefix if any(key.startswith(one.prefix) for key in state) else ""
    return {
        front + key: torch.zeros(
            [getattr(config, side) if isinstance(side, str) else side for side in shape], dtype=dtype
        )
        for key, shape in one.zeros.items()
    }


def timm_model(config: ViTConfig) -> Any:
    """timm's model of the same architecture; its weights are to be replaced."""
    import timm

    name = "deit_small_distilled_patch16_224" if config.dist_token else "vit_small_patch16_224"
    same = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio",
            "init_values", "reg_tokens", "fc_norm", "drop_path_rate")  # fmt: skip
    return timm.create_model(
        name,
        **{field: getattr(config, field) for field in same},
        global_pool="token" if config.dist_token else config.global_pool,
        no_embed_class=not config.class_position,
        act_layer={"erf": "gelu", "tanh": "gelu_tanh"}[config.gelu],
        norm_layer=partial(nn.LayerNorm, eps=config.eps),
        dynamic_img_size=True,
    )


def _timm(layout: str, state: Mapping[str, Tensor], config: ViTConfig, folder: Path | None) -> Forward:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    if folder is not None:
        return partial(_timm_forward, timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), config)
    if layout == "dinov2" and config.reg_tokens:  # timm adds the class token's position to the token
        config = config.override(class_position=False)
    model = timm_model(config)
    if get_layout(layout).facts is not None:  # Google's
        with tempfile.TemporaryDirectory() as temporary:
            write_npz(Path(temporary) / "model.npz", state)
            model.load_pretrained(str(Path(temporary) / "model.npz"))
    else:
        in_front = {"dino": "backbone.", "moco": "base_encoder."}.get(layout, "")
        clean = {key.removeprefix(in_front): tensor for key, tensor in state.items() if key.startswith(in_front)}
        model.load_state_dict(checkpoint_filter_fn(clean, model, adapt_layer_scale=layout == "deit3"))
    return partial(_timm_forward, model.eval(), config)


def _timm_forward(model: Any, config: ViTConfig, images: Tensor) -> Tensor:
    return model(images) if config.num_classes else model.forward_features(images)


def _transformers(layout: str, state: Mapping[str, Tensor], config: ViTConfig, folder: Path | None) -> Forward:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    values = transformers_config.write_config(config, Attributes(Preprocessing()))
    kind = getattr(transformers, values["architectures"][0])
    extra = {"add_pooling_layer": False} if values["architectures"][0] in ("ViTModel", "DeiTModel") else {}
    if folder is not None:
        model = kind.from_pretrained(folder, **extra)
    elif layout.endswith("_memory"):
        model = kind(transformers.AutoConfig.for_model(**values), **extra)
        model.load_state_dict(dict(state))
    else:
        settings = transformers.AutoConfig.for_model(**values)
        model, info = kind.from_pretrained(
            None, config=settings, state_dict=dict(state), output_loading_info=True, **extra
        )
        odd = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
        if odd:
            raise CheckpointError(f"transformers finds these keys missing or unexpected: {', '.join(map(str, odd))}")
    return partial(_transformers_forward, model.eval(), config)


def _transformers_forward(model: Any, config: ViTConfig, images: Tensor) -> Tensor:
    native = tuple(images.shape[2:]) == config.img_size
    dinov2 = config.init_values is not None  # whose classes interpolate unasked
    output = model(images) if native or dinov2 else model(images, interpolate_pos_encoding=True)
    return output.logits if config.num_classes else output.last_hidden_state


def _torchvision(layout: str, state: Mapping[str, Tensor], config: ViTConfig, folder: Path | None) -> Forward:
    from torchvision.models import VisionTransformer  # type: ignore[import-untyped]

    if config.img_size[0] != config.img_size[1]:
        raise CheckpointError(f"torchvision's model is square, not {config.img_size}")
    model = VisionTransformer(
        config.img_size[0], config.patch_size, config.depth, config.num_heads, config.embed_dim, config.mlp_dim,
        num_classes=config.num_classes or 1, norm_layer=partial(nn.LayerNorm, eps=config.eps),
    )  # fmt: skip
    if not config.num_classes:
        model.heads = nn.Sequential()
    if layout == "torchvision_old":  # which torchvision tells by the version that a state dict carries
        state = type(model.state_dict())(state)
        state._metadata = {}  # type: ignore[attr-defined]
    model.load_state_dict(state)
    return partial(_torchvision_forward, model.eval(), config)


def _torchvision_forward(model: Any, config: ViTConfig, images: Tensor) -> Tensor:
    if config.num_classes:
        return model(images)
    x = model._process_input(images)
    return model.encoder(torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1))
