"""The place in a block where its attention function is called: what goes in, what must come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import check_callable, get_attention, given, is_exact, is_factory, registered, sdpa
from .checks import parameters
from .config import ViTConfig

Grid = tuple[int, int]


class Attend(nn.Module):
    """Attention as one block has it: a function, or a module of its own, with the options it was set with.

    A function under a registered name is pickled as that name.
    """

    fn: Callable[..., Any]

    def __init__(self, config: ViTConfig, block: int) -> None:
        super().__init__()
        self.block = block
        self.prefix = config.num_prefix_tokens
        self.patched = 0  # how many active `vit.patch` contexts hold it
        self.set(sdpa, "sdpa", {})

    def set(
        self,
        fn: Callable,
        name: str | None,
        options: dict[str, Any],
        check: bool = False,
        source: Callable | None = None,
    ) -> None:
        """Attend by this function from now on, or by the module that the factory `source` has made."""
        if "fn" in self._modules:  # which PyTorch lets no function replace
            del self.fn
        self.fn = fn
        self.name = name
        self.source = source or fn  # what the name stood for
        self.exact = is_exact(name) and not options  # whether it gives the numbers of `sdpa`
        self.options = options
        self.given = given(fn.forward if isinstance(fn, nn.Module) else fn)
        known = {"prefix": self.prefix, "block": self.block}
        fixed = {keyword: value for keyword, value in known.items() if keyword in self.given}
        self.keywords = fixed if isinstance(fn, nn.Module) else {**options, **fixed}  # a factory has had its options
        self.check = check

    @property
    def called(self) -> str:
        """What errors call it."""
        return repr(self.name or getattr(self.fn, "__name__", type(self.fn).__name__))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | list[Grid] | None = None, lengths: list[int] | None = None
    ) -> Tensor:
        """Call the function.

        Args:
            q, k, v: each [B, A, T, d].
            grid: (h, w) of the patches; with `lengths` a list of one for each image.
            lengths: of packed images, whose tokens lie one after another: then B is 1.

        Returns:
            [B, A, T, d].

        Raises:
            ValueError: what the function raises, with the block's number; a result of another shape, dtype or device;
                with `check`, one that is not finite.
        """
        try:
            if lengths is None or "lengths" in self.given:
                return self.call(q, k, v, grid, lengths)
            assert isinstance(grid, list)
            images = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), grid)
            return torch.cat([self.call(*image) for image in images], dim=2)
        except ValueError as error:
            raise ValueError(f"block {self.block}: {error}") from error
        except Exception as error:
            if hasattr(error, "add_note"):  # since Python 3.11
                error.add_note(f"in block {self.block}, attention {self.extra_repr()}")
            raise

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | list[Grid] | None, lengths: list[int] | None = None
    ) -> Tensor:
        """Call the function and check its result."""
        keywords = self.keywords
        if "grid" in self.given:
            if grid is None:
                raise ValueError(f"attention {self.called} asks for the grid, and the block was called without it")
            keywords = {**keywords, "grid": grid}
        if "lengths" in self.given:
            keywords = {**keywords, "lengths": lengths}
        out = self.fn(q, k, v, **keywords)  # [B, A, T, d]
        if not isinstance(out, Tensor) or out.shape != q.shape or out.dtype != v.dtype or out.device != v.device:
            raise ValueError(f"attention {self.called} returned {kind(out)}, expected {kind(q)}")
        if self.check:
            self.check_finite(out, {"q": q, "k": k, "v": v})
        return out

    def check_finite(self, out: Tensor, given: Mapping[str, Tensor]) -> None:
        """ValueError where the result is not finite, or where what the function was given is not."""
        for name, tensor in given.items():
            if not tensor.isfinite().all():
                raise ValueError(f"attention {self.called} was given {name} with values that are not finite")
        if not out.isfinite().all():
            raise ValueError(f"attention {self.called} returned values that are not finite, from q, k and v that are")

    def extra_repr(self) -> str:
        """For print(model)."""
        options = {
            key: kind(value) if isinstance(value, Tensor) else repr(value) for key, value in self.options.items()
        }
        return ", ".join([self.called, *(f"{key}={value}" for key, value in options.items())])

    def __getstate__(self) -> dict[str, Any]:
        if self.patched:
            raise ValueError(f"block {self.block} is patched, and a copy would stay so: leave vit.patch first")
        state = self.__dict__.copy()
        if registered(self.name) is self.source:
            for key in ("fn", "source"):
                state.pop(key, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "source" not in state:
            assert self.name is not None
            try:
                self.source = get_attention(self.name)
            except ValueError as error:
                raise ValueError(f"{error} Register it before unpickling, with vit.register_attention") from None
        if "fn" not in state and "fn" not in self._modules:
            self.fn = self.source


def choose(fn: Callable, name: str | None, config: ViTConfig, options: dict[str, Any]) -> Callable[[int], Callable]:
    """What gives each block, by its number, its attention: the one function for all, or a module of its own.

    Raises:
        ValueError: a function that cannot be called as `vit.attention` says or knows no such option, a factory that
            makes no module that could.
    """
    called = name or str(getattr(fn, "__name__", fn))
    check_callable(fn, called, options)
    if taken := [option for option in ("name_or_fn", "blocks", "check") if option in parameters(fn)]:
        raise ValueError(f"attention {called!r}: set_attention takes {', '.join(taken)}: give the option another name")
    if not is_factory(fn):
        return lambda block: fn

    def make(block: int) -> nn.Module:
        module = fn(config, block, **options)
        if not isinstance(module, nn.Module):
            got = type(module).__name__
            raise ValueError(f"block {block}: factory {called!r} returned {got}, expected an nn.Module")
        check_callable(module.forward, called, {})
        return module

    return make


def kind(out: object) -> str:
    """Dtype, shape and device of a tensor, in words."""
    return f"{out.dtype} {list(out.shape)} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
