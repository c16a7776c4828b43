"""Seeing inside a model while it runs, and changing what is seen: activations by name, by PyTorch's forward hooks.

Every module's output has the module's name (`blocks.3`, the residual stream after block 3; `blocks.3.mlp.fc1`).
Around each block's attention there are more:

    blocks.3.attention.q, .k, .v             [B, A, T, d]
    blocks.3.attention.scores                [B, A, T, T]   q k^T / sqrt(d), before the softmax
    blocks.3.attention.weights               [B, A, T, T]   after it
    blocks.3.attention.heads                 [B, A, T, d]   what each head found
    blocks.3.attention.out                   [B, T, D]      the heads joined and projected
    blocks.3.residual_attention, .residual_mlp   [B, T, D]  what the block adds to the stream, in its two halves

`scores` and `weights` are computed beside the function that attends, and only where asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attend import Attend, kind
from .checks import warn
from .model import Attention, ViT

Change = Callable[[Tensor], Tensor]

_INPUTS = ("q", "k", "v")
_PARTS = (*_INPUTS, "scores", "weights", "heads", "out")  # of attention


def record(model: ViT, images: Tensor, names: str | Iterable[str]) -> Any:
    """Run the model and keep what the named places hold. One thread at a time: hooks see every call of the model.

    Args:
        model: the model as it was before compiling.
        images: [B, C, H, W], as for `model`.
        names: names as above, or one of them; "?" for the list of all that there are.

    Returns:
        name -> tensor, in the order of `names`; a part of the autograd graph where gradients are on. Or the list.

    Raises:
        ValueError: an unknown name (the nearest one is named), or a compiled model, which bypasses hooks.
    """
    if names == "?":
        return _all_names(_check_model(model))
    wanted = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"names must be a text or several, not {names!r}")
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in dict.fromkeys(wanted):
            stack.enter_context(_watch(_check_model(model), name, partial(_keep, kept, name), changes=False))
        model(images)
    if missed := [name for name in wanted if name not in kept]:
        raise ValueError(f"{', '.join(missed)}: no part of this model's forward pass")
    return {name: kept[name] for name in wanted}


@contextmanager
def patch(model: ViT, changes: Mapping[str, Change | Tensor]) -> Iterator[ViT]:
    """Change what the named places hold, inside the `with`; afterwards the model is as it was.

    Args:
        model: the model as it was before compiling.
        changes: name as above -> a function from the tensor to what takes its place, or a tensor that does (what
            `record` kept of another image: activation patching, arXiv:2202.05262). Where `scores` or `weights` are
            changed, the block attends by the written-out formula meanwhile.

    Raises:
        ValueError: as `record`; another shape, dtype or device than it was; `scores` or `weights` of a block whose
            function does not have such.
    """
    if not isinstance(changes, Mapping):
        raise ValueError(f"changes must map names to what takes their place, not {type(changes).__name__}")
    reached: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(_patched(_check_model(model)))
        for name, change in changes.items():
            if not isinstance(change, Tensor) and not callable(change):
                raise ValueError(f"{name} is changed by a function or to a tensor, not {type(change).__name__}")
            see = partial(_replace, reached, name, change)
            stack.enter_context(_watch(model, name, see, changes=True))
        yield model
    if missed := [name for name in changes if name not in reached]:  # a compiled copy of the model bypasses hooks
        warn(f"{', '.join(missed)}: never reached while patched")


@contextmanager
def _patched(model: ViT) -> Iterator[None]:
    """While it is, it refuses to be copied."""
    model.patches += 1
    try:
        yield
    finally:
        model.patches -= 1


def _keep(kept: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    kept[name] = tensor
    # What attention is given it may change in place.
    return tensor.clone() if name.rpartition(".")[2] in (*_INPUTS, "qkv") else tensor


def _replace(reached: set[str], name: str, change: Change | Tensor, tensor: Tensor) -> Tensor:
    reached.add(name)
    new = change.clone() if isinstance(change, Tensor) else change(tensor)  # which may be changed in place
    found, expected = kind(new), kind(tensor)
    if found != expected:
        raise ValueError(f"{name} is changed to {found}, expected {expected}")
    return new


@contextmanager
def _watch(model: ViT, name: str, see: Change, changes: bool) -> Iterator[None]:
    """Let `see` have what is at a place, and put what it gives back there."""
    modules = dict(model.named_modules())
    owner, _, part = name.rpartition(".")
    attend = modules.get(f"{owner}.attend")
    with ExitStack() as stack:
        if not isinstance(attend, Attend) or part not in _PARTS:
            if name not in _module_names(model):
                nearest = get_close_matches(name, _all_names(model), n=1)
                hint = f"did you mean {nearest[0]!r}? " if nearest else ""
                hint = "blocks are numbered from 0; " if ".-" in name else hint
                raise ValueError(f"there is no {name!r} in this model: {hint}vit.record(model, images, '?') lists all")
            handle = modules[name].register_forward_hook(partial(_see_output, see))
        elif part in _INPUTS:
            handle = attend.register_forward_pre_hook(partial(_see_input, see, _INPUTS.index(part)))
        elif part == "heads":
            handle = attend.register_forward_hook(partial(_see_output, see))
        elif part == "out":
            handle = modules[owner].register_forward_hook(partial(_see_output, see))
        elif isinstance(attend.fn, WrittenOut) or changes:
            formula = stack.enter_context(_written_out(attend))
            handle = formula.get_submodule(part).register_forward_hook(partial(_see_output, see))
        else:
            if not attend.exact:
                warn(f"{name} is that of softmax attention, and the block attends otherwise")
            handle = attend.register_forward_pre_hook(partial(_see_beside, see, part))
        stack.callback(handle.remove)
        yield


def _see_output(see: Change, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return see(output)


def _see_input(see: Change, i: int, module: nn.Module, inputs: tuple) -> tuple:
    return (*inputs[:i], see(inputs[i]), *inputs[i + 1 :])


def _see_beside(see: Change, part: str, module: nn.Module, inputs: tuple) -> None:
    """`scores` or `weights`, computed for `see` alone."""
    scores = _scores(*inputs[:2])  # [B, A, T, T]
    see(scores if part == "scores" else scores.softmax(dim=-1))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, A, T, T]


class WrittenOut(nn.Module):
    """`reference` without a bias, which no model gives, and with a module where its scores and its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.weights = nn.Identity(), nn.Identity()
        self.before: tuple = ()  # what it stands for

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `vit.attention`."""
        scores = self.scores(_scores(q, k))  # [B, A, T, T]
        return self.weights(scores.softmax(dim=-1)) @ v  # [B, A, T, d]


@contextmanager
def _written_out(attend: Attend) -> Iterator[WrittenOut]:
    """A block that attends by the formula, for a while; ValueError where it attends by another one."""
    if isinstance(attend.fn, WrittenOut):
        with _hold(attend, attend.fn):
            yield attend.fn
        return
    if not attend.exact:
        raise ValueError(
            f"block {attend.block} attends by {attend.called}, whose scores and weights cannot be changed from outside:"
            " set_attention('sdpa') first, or change its q, k, v or heads"
        )
    before, formula = (attend.fn, attend.name, attend.options, attend.check, attend.source), WrittenOut()
    attend.set(formula, None, {}, attend.check, WrittenOut)
    formula.before = before
    with _hold(attend, formula):
        yield formula


@contextmanager
def _hold(attend: Attend, formula: WrittenOut) -> Iterator[None]:
    """Attend by the formula until the last who asked for it has gone, in whatever order they go."""
    attend.patched += 1
    try:
        yield
    finally:
        attend.patched -= 1
        if not attend.patched:
            attend.set(*formula.before)


def _check_model(model: ViT) -> ViT:
    if not isinstance(model, ViT):
        raise ValueError(f"expected a vit.ViT as it was before compiling, not {type(model).__name__}")
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("parts of this model are compiled, and would bypass hooks: take it before .compile()")
    if model.config.grad_checkpointing and torch.is_grad_enabled():
        raise ValueError("gradient checkpointing runs blocks once more when hooks are gone: under torch.no_grad() only")
    return model


def _module_names(model: ViT) -> list[str]:
    """Modules that are called, by name: not lists of them, nor what stands behind the parts of attention."""
    modules = dict(model.named_modules())
    skipped = [name for name, module in modules.items() if isinstance(module, (ViT, nn.ModuleList, Attend))]
    return [name for name in modules if name not in skipped]


def _all_names(model: ViT) -> list[str]:
    names = []
    for name in _module_names(model):
        names += [f"{name}.{part}" for part in _PARTS if isinstance(model.get_submodule(name), Attention)] or [name]
    return names
