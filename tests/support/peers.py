"""Models of timm, transformers and torchvision around a checkpoint, to compare ours with.

`python tests/reports/check_conversion.py` runs them on two files, and the tests on state dicts.
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
from vit.weights.checkpoint import CheckpointError
from vit.weights.description import Attributes, assumed
from vit.weights.formats.npz import write_npz
from vit.weights.layouts import get_layout, transformers_config
from vit.weights.load import Loaded, build
from vit.weights.source import WEIGHT_FILES
from vit.weights.verify import compare_settings

# A check fails above this difference, relative to the largest value; float32 gives 1e-6 to 1e-5.
BAR = 1e-4


class NoPeer(CheckpointError):
    """No other library can run a layout here."""


Forward = Callable[[Tensor], Tensor]  # images -> logits, or tokens after the final norm if there is no head


def build_peer(layout: str, state: Mapping[str, Tensor], config: ViTConfig, folder: Path | None = None) -> Forward:
    """The forward pass of a layout's own library around a state dict in that layout.

    Args:
        layout: its name.
        state: every weight of the model, under the layout's names without a wrapper.
        config: of the model.
        folder: a folder of timm's or transformers' own files, which their own loaders then read; None builds the
            model from `config`.

    Raises:
        NoPeer: the library is not installed, or no other library reads the layout.
        CheckpointError: the library does not accept the weights.
    """
    library = get_layout(layout).library
    if library is None:
        raise NoPeer(f"no other library reads the {layout} layout, this project's own")
    make = {"timm": _timm, "transformers": _transformers, "torchvision": _torchvision}[library]
    try:
        return make(layout, dict(state) | _zeros(layout, state, config), config, folder)
    except CheckpointError:
        raise
    except ModuleNotFoundError as error:  # the library, or one that it needs
        name = (error.name or library).partition(".")[0]
        raise NoPeer(f"{name} is not installed: pip install {name}") from None
    except Exception as error:  # each library has its own way to fail
        raise CheckpointError(f"{library} cannot load this: {str(error).splitlines()[0]}") from None


def _zeros(layout: str, state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Zeros for the keys that this project drops and the layout's own library needs."""
    naming, dtype = get_layout(layout).naming, next(iter(state.values())).dtype
    front = naming.prefix if any(key.startswith(naming.prefix) for key in state) else ""
    return {
        front + key: torch.zeros(
            [getattr(config, side) if isinstance(side, str) else side for side in shape], dtype=dtype
        )
        for key, shape in naming.zeros.items()
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
    if config.reg_tokens:  # timm's register models have no row for the class token: timm adds the row to the token
        config = config.override(class_position=False)
    model = timm_model(config)
    one = get_layout(layout)
    if one.files.npz:
        with tempfile.TemporaryDirectory() as temporary:
            write_npz(Path(temporary) / "model.npz", state)
            model.load_pretrained(str(Path(temporary) / "model.npz"))
    else:
        in_front = one.naming.prefix if one.naming.always_prefixed else ""
        clean = {key.removeprefix(in_front): tensor for key, tensor in state.items() if key.startswith(in_front)}
        model.load_state_dict(checkpoint_filter_fn(clean, model, adapt_layer_scale=True))
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
    elif not get_layout(layout).files.beside:  # its names in memory
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
    dinov2 = config.init_values is not None  # its classes interpolate at every size
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
    model.load_state_dict(dict(state))  # without version numbers, so that names from before 0.13 are accepted too
    return partial(_torchvision_forward, model.eval(), config)


def _torchvision_forward(model: Any, config: ViTConfig, images: Tensor) -> Tensor:
    if config.num_classes:
        return model(images)
    x = model._process_input(images)
    return model.encoder(torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1))


# --- two files


@torch.inference_mode()
def check(source: Loaded, result: Loaded) -> tuple[dict[str, float | str], list[str]]:
    """Run a checkpoint and its conversion on noise, each in ours and in its own library.

    Returns:
        What ran against what -> the largest difference over the largest value, or "not run: " and why; and notes on
        what this does not prove.

    Raises:
        CheckpointError: a difference above `BAR`, a library that does not accept the weights, or no other library can
            run either file.
    """
    generator = torch.Generator().manual_seed(0)
    config = source.ours.config
    images = torch.randn(2, config.in_chans, *config.img_size, generator=generator)
    expected = _forward(source, images)
    rows: dict[str, float | str] = {
        f"source in {_library(source)} against source in vit": _in_its_library(source, images, expected),
        "result in vit against source in vit": _difference(_forward(result, images), expected),
        f"result in {_library(result)} against source in vit": _in_its_library(result, images, expected),
    }
    reasons = [found for found in rows.values() if isinstance(found, str)]
    if len(reasons) == 2:
        raise CheckpointError(f"nothing to check against: {'; '.join(dict.fromkeys(reasons))}")
    for what, found in rows.items():
        if not isinstance(found, str) and found > BAR:
            raise CheckpointError(
                f"{what}: the largest difference is {found:.1e} of the largest value, expected at most {BAR:.0e}"
                + (_cause(source, result) if what.startswith("result") else "")
            )
    notes = []
    if assumed(config) and _folder(source) is None:
        notes.append("both sides of the check ran with what is assumed, so it does not prove that")
    return {what: f"not run: {found}" if isinstance(found, str) else found for what, found in rows.items()}, notes


def _library(loaded: Loaded) -> str:
    return loaded.ours.layout.library or "its own library"


def _in_its_library(loaded: Loaded, images: Tensor, expected: Tensor) -> float | str:
    """How far the outputs of a layout's own library are from the expected ones; or why it cannot be run."""
    ours, naming = loaded.ours, loaded.ours.layout.naming
    tensors = loaded.checkpoint.tensors
    state = {key[len(ours.prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(ours.prefix)}
    state = state if naming.unpack is None else naming.unpack(state)
    theirs = {key: state[key].float() for _, keys in ours.groups.values() for key in keys}
    try:
        peer = build_peer(ours.layout.name, theirs, ours.config, _folder(loaded))
    except NoPeer as error:
        return str(error)
    return _difference(peer(images), expected)


def _folder(loaded: Loaded) -> Path | None:
    """The folder, if these are the files of timm or transformers in a folder that their own loaders read."""
    alone = loaded.found.config is None or bool(loaded.ours.prefix)
    path = loaded.checkpoint.path
    return path.parent if loaded.ours.layout.files.beside and not alone and path.name in WEIGHT_FILES else None


def _cause(source: Loaded, result: Loaded) -> str:
    """The settings of the model that are not the same in both, which may explain a difference."""
    fields = source.ours.config.field_names()
    differ = compare_settings(source, result).items()
    odd = {name: values for name, values in differ if name in fields and values[2] == "changes results"}
    if not odd:
        return ""
    texts = [f"{name} {one!r} (the result has {two!r})" for name, (one, two, _) in odd.items()]
    return f"; these settings of the source changed: {', '.join(texts)}"


def _forward(loaded: Loaded, images: Tensor) -> Tensor:
    model = build(loaded).float().eval()
    return model(images) if loaded.ours.config.num_classes else model.forward_features(images)


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()
