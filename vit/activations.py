"""Read and change activations by name, through PyTorch's forward hooks.

The output of every module has the module's name: `blocks.3.mlp.fc1`, or `blocks.3`, the residual stream after block 3.
Attention has more names:

    blocks.3.attention.q, .k, .v                [B, A, T, d]
    blocks.3.attention.scores                   [B, A, T, T]   q k^T / sqrt(d), before the softmax
    blocks.3.attention.weights                  [B, A, T, T]   after the softmax
    blocks.3.attention.heads                    [B, A, T, d]   the output of each head
    blocks.3.attention.out                      [B, T, D]      the heads, concatenated and projected
    blocks.3.residual_attention, .residual_mlp  [B, T, D]      what each half of the block adds to the residual stream

`scores` and `weights` are computed beside the attention function, and only if they are asked for.
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

from .attend import Attend, describe
from .checks import inside, warn
from .model import Attention, ViT

Change = Callable[[Tensor], Tensor]

_INPUTS = ("q", "k", "v")
_COMPUTED = ("scores", "weights")
_PARTS = (*_INPUTS, *_COMPUTED, "heads", "out")  # of attention


def record(model: ViT, images: Tensor, names: str | Iterable[str]) -> Any:
    """Run the model and keep the named activations. Use a model from one thread at a time: hooks see every call.

    Args:
        model: the model itself, not a compiled wrapper.
        images: [B, C, H, W], as for `model`.
        names: names as in the docstring of `vit.activations`, or one of them; "?" for the list of all names.

    Returns:
        name -> tensor, in the order of `names`, part of the autograd graph if gradients are enabled. Or the list.

    Raises:
        ValueError: an unknown name (the error gives the nearest one), or a compiled model, which bypasses hooks.
    """
    if names == "?":
        return _all_names(_check_model(model))
    wanted = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"names must be a string or several, not {names!r}")
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in dict.fromkeys(wanted):
            stack.callback(_watch(_check_model(model), name, partial(_keep, kept, name)))
        model(images)
    if missed := [name for name in wanted if name not in kept]:
        raise ValueError(f"{', '.join(missed)}: not reached by this model's forward pass")
    return {name: kept[name] for name in wanted}


@contextmanager
def patch(model: ViT, changes: Mapping[str, Change | Tensor]) -> Iterator[ViT]:
    """Change the named activations inside the `with` block. Afterwards the model is as before.

    Args:
        model: the model itself, not a compiled wrapper.
        changes: a name as for `record` -> a function of the tensor that returns the new one, or the new tensor itself,
            for example one that `record` kept of another image (activation patching, arXiv:2202.05262). If `scores` or
            `weights` of a block are changed, its heads are computed from them as in `vit.attention.reference`.

    Raises:
        ValueError: as `record`; a new tensor of another shape, dtype or device; `scores` or `weights` of a block whose
            attention function does not compute them, or for which an outer `vit.patch` changes them already.
    """
    if not isinstance(changes, Mapping):
        raise ValueError(f"changes must map names to functions or tensors, not {type(changes).__name__}")
    if not all(isinstance(name, str) for name in changes):
        raise ValueError(f"names must be strings, not {list(changes)!r}")
    reached: set[str] = set()
    with ExitStack() as stack:
        slots = {
            f"blocks.{slot.block}.attention.{part}": slot for slot in _check_model(model).attends for part in _COMPUTED
        }
        for slot in dict.fromkeys(slots[name] for name in changes if name in slots):
            stack.enter_context(_recompute(slot))
        for name, change in changes.items():
            if not isinstance(change, Tensor) and not callable(change):
                raise ValueError(f"the change of {name} must be a function or a tensor, not {type(change).__name__}")
            stack.callback(_watch(model, name, partial(_replace, reached, name, change)))
        yield model
    if missed := [name for name in changes if name not in reached]:  # a compiled copy of the model bypasses hooks
        warn(f"{', '.join(missed)}: never reached while patched")


def _keep(kept: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    kept[name] = tensor
    # An attention function may write to its inputs in place.
    return tensor.clone() if name.rpartition(".")[2] in (*_INPUTS, "qkv") else tensor


def _replace(reached: set[str], name: str, change: Change | Tensor, tensor: Tensor) -> Tensor:
    reached.add(name)
    new = change.clone() if isinstance(change, Tensor) else change(tensor.clone())  # which may be changed in place
    found, expected = describe(new), describe(tensor)
    if found != expected:
        raise ValueError(f"{name} is changed to {found}, expected {expected}")
    return new


def _watch(model: ViT, name: str, see: Change) -> Callable[[], Any]:
    """Call `see` with the named activation, and put what it returns in its place. Returns what ends this."""
    modules = dict(model.named_modules())
    owner, _, part = name.rpartition(".")
    slot = modules.get(f"{owner}.attend")
    if not isinstance(slot, Attend) or part not in _PARTS:
        if name not in _module_names(model):
            raise ValueError(_unknown(model, name))
        return modules[name].register_forward_hook(_Hook(_see_output, see)).remove
    if part in _INPUTS:
        return slot.register_forward_pre_hook(_Hook(_see_input, see, _INPUTS.index(part))).remove
    if part in ("heads", "out"):
        place = slot if part == "heads" else modules[owner]
        return place.register_forward_hook(_Hook(_see_output, see)).remove
    if isinstance(slot.instead, _Formula):  # patched: the scores and weights are those that it computes
        slot.instead.see[part].append(see)
        return partial(slot.instead.see[part].remove, see)
    if not slot.exact:
        warn(f"{name} is that of softmax attention, but block {slot.block} attends by another function")
    return slot.register_forward_pre_hook(_Hook(_see_beside, see, part)).remove


class _Hook:
    """A forward hook, with its first arguments. It refuses to be copied, since a copied model would stay patched."""

    def __init__(self, fn: Callable[..., Any], *args: Any) -> None:
        self.fn, self.args = fn, args

    def __call__(self, *args: Any) -> Any:
        return self.fn(*self.args, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("the model is patched, and a copy would stay patched: leave vit.patch first")


def _see_output(see: Change, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return see(output)


def _see_nothing(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    pass


def _see_input(see: Change, i: int, module: nn.Module, inputs: tuple) -> tuple:
    return (*inputs[:i], see(inputs[i]), *inputs[i + 1 :])


def _see_beside(see: Change, part: str, module: nn.Module, inputs: tuple) -> None:
    """`scores` or `weights`, computed for `see` alone."""
    scores = _scores(*inputs[:2])  # [B, A, T, T]
    see(scores if part == "scores" else scores.softmax(dim=-1))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, A, T, T]


class _Formula:
    """`vit.attention.reference`, called in place of a slot's function, with its scores and weights seen on the way."""

    def __init__(self, slot: Attend) -> None:
        self.slot = slot
        self.see: dict[str, list[Change]] = {"scores": [], "weights": []}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, A, T, d]."""
        if not self.slot.exact:  # set inside of `patch`
            raise ValueError(_not_softmax(self.slot))
        scores = _scores(q, k)  # [B, A, T, T]
        for see in self.see["scores"]:
            scores = see(scores)
        weights = scores.softmax(dim=-1)  # [B, A, T, T]
        for see in self.see["weights"]:
            weights = see(weights)
        return weights @ v  # [B, A, T, d]


@contextmanager
def _recompute(slot: Attend) -> Iterator[None]:
    """Let the slot call a `_Formula` meanwhile."""
    if not slot.exact:
        raise ValueError(f"block {slot.block}: {_not_softmax(slot)}")
    if slot.instead:
        raise ValueError(f"scores or weights of block {slot.block} are patched already: give one vit.patch all changes")
    slot.instead = _Formula(slot)
    mark = slot.register_forward_hook(_Hook(_see_nothing))  # refuses copies, and optimized models look for hooks
    try:
        yield
    finally:
        mark.remove()
        slot.instead = None


def _not_softmax(slot: Attend) -> str:
    return (
        f"attention {slot.choice.called!r} computes no scores and weights that can be changed:"
        " call set_attention('sdpa') first, or change q, k, v or heads"
    )


def _check_model(model: ViT) -> ViT:
    if not isinstance(model, ViT):
        held = inside(model, ViT)
        hint = f": pass the model, not its wrapper: its .{held}" if held else ""
        raise ValueError(f"expected a vit.ViT, not {type(model).__name__}{hint}")
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("parts of this model are compiled and would bypass hooks: use it before calling .compile()")
    if model.config.grad_checkpointing and torch.is_grad_enabled():
        raise ValueError("gradient checkpointing runs blocks again after the hooks are removed: use torch.no_grad()")
    return model


def _unknown(model: ViT, name: str) -> str:
    nearest = get_close_matches(name, _all_names(model), n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    block = name.split(".")[1] if name.startswith("blocks.") else "0"
    if not block.isdecimal() or int(block) >= len(model.blocks):
        hint = f"blocks are numbered from 0 to {len(model.blocks) - 1}; "
    return f"unknown activation {name!r}: {hint}vit.record(model, images, '?') lists all names"


def _module_names(model: ViT) -> list[str]:
    """The names of modules whose output can be seen: not lists of modules, and not the attention slots."""
    modules = dict(model.named_modules())
    skipped = [name for name, module in modules.items() if isinstance(module, (ViT, nn.ModuleList, Attend))]
    return [name for name in modules if name not in skipped]


def _all_names(model: ViT) -> list[str]:
    names = []
    for name in _module_names(model):
        names += [f"{name}.{part}" for part in _PARTS if isinstance(model.get_submodule(name), Attention)] or [name]
    return names
