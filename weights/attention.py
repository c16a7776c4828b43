"""Attention that is not the default, in checkpoints: its registered name, its options and its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from torch import Tensor, nn

from vit.attend import Attend
from vit.checks import warn
from vit.model import ViT
from vit.registry import is_exact, registered

from .checkpoint import CheckpointError
from .description import AttentionSetting

DEFAULT = AttentionSetting("sdpa", {})


def is_attention_key(key: str) -> bool:
    """Whether a key in our names is a weight of an attention module set by the user; it may have any name there."""
    return re.match(r"blocks\.\d+\.attention\.attend\.fn\.", key) is not None


def settings_of(model: ViT) -> list[AttentionSetting] | None:
    """The attention of each block, for a file to record; None if every block has the default.

    A function without a registered name, or with options that JSON cannot hold, is left out with a warning.

    Raises:
        CheckpointError: such a function has weights, which would be lost.
    """
    settings = []
    forgotten: dict[str, list[int]] = {}
    for attend in model.attends:
        problem = _cannot_record(attend)
        if problem and attend.state_dict():
            raise CheckpointError(f"block {attend.block}: attention {attend.choice.called!r} has weights and {problem}")
        if problem:
            forgotten.setdefault(f"attention {attend.choice.called!r} {problem}", []).append(attend.block)
        settings.append(DEFAULT if problem or attend.name is None else AttentionSetting(attend.name, attend.options))
    for text, blocks in forgotten.items():
        warn(f"blocks {', '.join(map(str, blocks))}: {text}: set it again after loading")
    return None if all(setting == DEFAULT for setting in settings) else settings


def _cannot_record(attend: Attend) -> str:
    """Why a checkpoint cannot name a block's attention; "" if it can."""
    if attend.name is None:
        return "has no registered name that a checkpoint could record (vit.register_attention gives it one)"
    if registered(attend.name) is not attend.source:
        return "has a name that was registered again since, for another function"
    try:
        if json.loads(json.dumps(attend.options)) == attend.options:
            return ""
    except (TypeError, ValueError):
        pass
    return "has options that JSON cannot hold"


def restore_attention(model: ViT, settings: list[AttentionSetting] | None, weights: Mapping[str, Tensor]) -> None:
    """Set the attention that a file records.

    Raises:
        CheckpointError: a name that is not registered, or weights that do not fit the modules of that name.
    """
    for i, setting in enumerate(settings or []):
        if setting != DEFAULT:
            try:
                model.set_attention(setting.name, [i], **setting.options)
            except ValueError as error:
                hint = "register it before loading, with vit.register_attention"
                raise CheckpointError(f"block {i} has attention {setting.name!r}: {error} ({hint})") from None
    left = dict(weights)
    for attend in model.attends:
        prefix = f"blocks.{attend.block}.attention.attend.fn."
        own = {key[len(prefix) :]: left.pop(key) for key in list(left) if key.startswith(prefix)}
        if isinstance(attend.fn, nn.Module):
            _fill(attend, own)
        elif own:
            called = attend.choice.called
            raise CheckpointError(f"the file has weights {prefix}*, but attention {called!r} has none")
    if left:
        raise CheckpointError(f"weights of attention in unknown blocks: {', '.join(left)}")


def _fill(attend: Attend, weights: Mapping[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in attend.fn.state_dict().items()}  # type: ignore[attr-defined]
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != expected:
        texts = [", ".join(f"{name} {list(shape)}" for name, shape in kind.items()) for kind in (found, expected)]
        where = f"block {attend.block}: attention {attend.choice.called!r}"
        raise CheckpointError(f"{where} has weights {texts[0] or 'none'}, expected {texts[1] or 'none'}")
    attend.fn.load_state_dict(weights, assign=True)  # type: ignore[attr-defined]


def unnamed(settings: list[AttentionSetting] | None) -> str | None:
    """The attention that files without our header cannot name; None if it gives the same numbers as `sdpa`."""
    odd = [one.name for one in settings or [] if not is_exact(one.name) or one.options]
    return ", ".join(dict.fromkeys(odd)) or None
