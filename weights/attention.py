"""Replaced attention in checkpoints: by its registered name, with its options and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor, nn

from vit.attend import Attend
from vit.checks import warn
from vit.model import ViT
from vit.registry import is_exact, registered

from .checkpoint import CheckpointError
from .description import AttentionSetting

DEFAULT = AttentionSetting("sdpa", {})


def settings_of(model: ViT) -> list[AttentionSetting] | None:
    """What a file is to remember of each block's attention; None where all attend as ever.

    A function that has no registered name, or options that JSON cannot hold, are warned of and forgotten.

    Raises:
        CheckpointError: the same of attention with weights, which would be lost.
    """
    settings = []
    forgotten: dict[str, list[int]] = {}
    for attend in model.attends:
        problem = _cannot_remember(attend)
        if problem and attend.state_dict():
            raise CheckpointError(f"block {attend.block}: attention {attend.choice.called!r} has weights and {problem}")
        if problem:
            forgotten.setdefault(f"attention {attend.choice.called!r} {problem}", []).append(attend.block)
        settings.append(DEFAULT if problem or attend.name is None else AttentionSetting(attend.name, attend.options))
    for text, blocks in forgotten.items():
        warn(f"blocks {', '.join(map(str, blocks))}: {text}: set it again after loading")
    return None if all(setting == DEFAULT for setting in settings) else settings


def _cannot_remember(attend: Attend) -> str:
    if attend.name is None:
        return "has no name by which a checkpoint could remember it (vit.register_attention gives one)"
    if registered(attend.name) is not attend.source:
        return "has a name that stands for something else by now"
    try:
        if json.loads(json.dumps(attend.options)) == attend.options:
            return ""
    except (TypeError, ValueError):
        pass
    return "has options that JSON cannot hold"


def restore_attention(model: ViT, settings: list[AttentionSetting] | None, weights: Mapping[str, Tensor]) -> None:
    """Attend as a file says.

    Raises:
        CheckpointError: a name that is not registered, or weights that are not those of the modules that it makes.
    """
    for i, setting in enumerate(settings or []):
        if setting != DEFAULT:
            try:
                model.set_attention(setting.name, [i], **setting.options)
            except ValueError as error:
                hint = "register it before loading, with vit.register_attention"
                raise CheckpointError(f"block {i} attends by {setting.name!r}: {error} ({hint})") from None
    left = dict(weights)
    for attend in model.attends:
        prefix = f"blocks.{attend.block}.attention.attend.fn."
        own = {key[len(prefix) :]: left.pop(key) for key in list(left) if key.startswith(prefix)}
        if isinstance(attend.fn, nn.Module):
            _fill(attend, own)
        elif own:
            called = attend.choice.called
            raise CheckpointError(f"there are weights {prefix}* and no attention that has any: {called!r}")
    if left:
        raise CheckpointError(f"there are weights of attention in blocks that there are not: {', '.join(left)}")


def _fill(attend: Attend, weights: Mapping[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in attend.fn.state_dict().items()}  # type: ignore[attr-defined]
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != expected:
        texts = [", ".join(f"{name} {list(shape)}" for name, shape in kind.items()) for kind in (found, expected)]
        where = f"block {attend.block}: attention {attend.choice.called!r}"
        raise CheckpointError(f"{where} has weights {texts[0] or 'none'}, expected {texts[1] or 'none'}")
    attend.fn.load_state_dict(weights, assign=True)  # type: ignore[attr-defined]


def unnamed(settings: list[AttentionSetting] | None) -> str | None:
    """The attention that files without our header cannot name; None where it gives the same numbers as `sdpa`."""
    odd = [one.name for one in settings or [] if not is_exact(one.name) or one.options]
    return ", ".join(dict.fromkeys(odd)) or None
