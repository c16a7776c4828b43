"""The slot in a block where its attention function is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .checks import warn
from .config import ViTConfig
from .packed import Grid, Packing
from .registry import DEFAULT, Call, Choice, choose, choose_again


class Attend(nn.Module):
    """Calls what a block attends with, a function or a module of its own, and checks what it returns."""

    fn: Callable[..., Any]
    instead: Callable[[Tensor, Tensor, Tensor], Tensor] | None  # called in place of `fn` while it is patched

    def __init__(self, config: ViTConfig, block: int) -> None:
        super().__init__()
        self.block = block
        self.instead = None
        self.set(DEFAULT, DEFAULT.make(config, block))

    def set(self, choice: Choice, call: Call, check: bool = False) -> None:
        """Attend by `call`, which `choice` made, from now on."""
        if "fn" in self._modules:  # PyTorch does not let a function take the place of a module
            del self.fn
        self.choice, self.check = choice, check
        self.fn, self.filled_in, self.keywords = call

    @property
    def name(self) -> str | None:
        """The registered name of the function or factory."""
        return self.choice.name

    @property
    def source(self) -> Callable[..., Any]:
        """The function, or the factory that made this block's module."""
        return self.choice.source

    @property
    def options(self) -> dict[str, Any]:
        """The options that `set_attention` was given."""
        return dict(self.choice.options)

    @property
    def exact(self) -> bool:
        """Whether it computes what `sdpa` computes."""
        return self.choice.exact

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None = None) -> Tensor:
        """Attend.

        Args:
            q, k, v: each [B, A, T, d].
            packing: how the images lie in T, for functions that need the grid or handle packed images.

        Returns:
            [B, A, T, d].

        Raises:
            ValueError: raised by the function (the block's number is added); a result of another shape, dtype or
                device; with `check`, values that are not finite.
        """
        try:
            if packing is None or packing.lengths is None or ("lengths" in self.filled_in and not self.instead):
                return self.call(q, k, v, packing)
            n, grids = packing.lengths, cast("list[Grid]", packing.grid)
            images = zip(zip(q.split(n, dim=2), k.split(n, dim=2), v.split(n, dim=2)), grids)
            return torch.cat([self.call(*one, Packing(grid)) for one, grid in images], dim=2)
        except ValueError as error:
            raise ValueError(f"block {self.block}: {error}") from error
        except Exception as error:
            if hasattr(error, "add_note"):  # since Python 3.11
                error.add_note(f"in block {self.block}, attention {self.extra_repr()}")
            raise

    def call(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
        """Call the function and check its result."""
        fn, filled_in, keywords = self.fn, self.filled_in, self.keywords
        if self.instead:
            fn, filled_in, keywords = self.instead, (), {}
        if "grid" in filled_in:
            if packing is None:
                raise ValueError(f"attention {self.choice.called!r} needs the grid: give the block a Packing((h, w))")
            keywords = {**keywords, "grid": packing.grid}
        if "lengths" in filled_in:
            keywords = {**keywords, "lengths": packing.lengths if packing else None}
        out = fn(q, k, v, **keywords)  # [B, A, T, d]
        if not isinstance(out, Tensor) or out.shape != q.shape or out.dtype != v.dtype or out.device != v.device:
            raise ValueError(f"attention {self.choice.called!r} returned {describe(out)}, expected {describe(q)}")
        if self.check:
            self.check_finite(q=q, k=k, v=v)
            self.check_finite(out=out)
        return out

    def check_finite(self, **tensors: Tensor) -> None:
        """ValueError for the first tensor with NaN or infinity; "out" is the result, others are inputs."""
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                what = "returned" if name == "out" else f"was given {name} with"
                raise ValueError(f"attention {self.choice.called!r} {what} values that are not finite")

    def extra_repr(self) -> str:
        """The name and options, for print(model)."""
        shown = {key: describe(x) if isinstance(x, Tensor) else repr(x) for key, x in self.options.items()}
        return ", ".join([repr(self.choice.called), *(f"{key}={value}" for key, value in shown.items())])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if state.get("fn") is self.choice.source:  # `Choice` pickles it by name where it can
            del state["fn"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"instead": None, **(state if "choice" in state else _from_version_0_1(state))})
        if "fn" not in self.__dict__ and "fn" not in self._modules:
            self.fn = self.choice.source


def set_all(slots: Sequence[Attend], choice: Choice, calls: Sequence[Call], like: Tensor, check: bool = False) -> None:
    """Set every slot; modules go to the device and floating dtype of `like`. Warns if trained attention is dropped."""
    if dropped := [str(slot.block) for slot in slots if slot.state_dict()]:
        warn(f"blocks {', '.join(dropped)}: the weights of their attention are dropped")
    for slot, call in zip(slots, calls):  # all of them before the first slot changes: a module may refuse
        if isinstance(call.fn, nn.Module):  # complex buffers keep their dtype: `Module.to` would make them real
            call.fn._apply(lambda x: x.to(like.device, like.dtype if x.is_floating_point() else None))
            call.fn.train(slot.training)
    for slot, call in zip(slots, calls):
        slot.set(choice, call, check)


def describe(out: object) -> str:
    """Dtype, shape and device of a tensor, in words."""
    return f"{out.dtype} {list(out.shape)} on {out.device}" if isinstance(out, Tensor) else type(out).__name__


def _from_version_0_1(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an `Attend` that was pickled before `Choice` existed."""
    state = dict(state)
    choice = (
        choose(state["source"], state["options"])
        if "source" in state
        else choose_again(state["name"], state["options"])
    )
    state["filled_in"] = state.pop("given")
    for gone in ("name", "source", "options", "exact", "prefix", "patched"):
        state.pop(gone, None)
    return {**state, "choice": choice}
