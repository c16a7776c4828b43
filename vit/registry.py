"""Attention by name, and the one place that decides what `ViT.set_attention` sets: `choose`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from torch import nn

from .attention import AttentionFactory, AttentionFunction, AttentionLike, reference, sdpa
from .checks import unknown
from .config import ViTConfig

FILLED_IN = ("lengths", "grid", "prefix", "block")  # keywords that the model fills in for a function that names them
_PASSED = ("q", "k", "v", *FILLED_IN)  # what the model passes to a function
_SETTINGS = ("name_or_fn", "blocks", "check")  # parameters of `set_attention`

_registry: dict[str, AttentionFunction | AttentionFactory] = {"reference": reference, "sdpa": sdpa}
_exact = {"reference", "sdpa"}


def register_attention(
    name: str, fn: AttentionFunction | AttentionFactory, *, exact: bool = False, overwrite: bool = False
) -> None:
    """Give an attention function or factory a name for `model.set_attention(name)`, checkpoints and pickles.

    Args:
        name: the new name.
        fn: a function or factory as described in `vit.attention`.
        exact: without options it computes softmax(q k^T / sqrt(d) + bias) v, as `sdpa` does. For other functions,
            attention maps carry a warning, and so do checkpoints in layouts that cannot name them.
        overwrite: replace an attention of the same name.

    Raises:
        ValueError: the name is taken and `overwrite` is not set, or `fn` has another signature.
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of an attention must be a string, not {name!r}")
    if name in attention_names() and not overwrite:
        raise ValueError(f"attention {name!r} is registered already; pass overwrite=True to replace it")
    _inspect(fn, name)
    _registry[name] = fn
    (_exact.add if exact else _exact.discard)(name)


def attention_names() -> list[str]:
    """The registered names, sorted, including the backends of `vit.kernels`."""
    importlib.import_module("vit.kernels")  # registers the faster backends
    return sorted(_registry)


def get_attention(name: str) -> AttentionFunction | AttentionFactory:
    """The function or factory with this name. ValueError if there is none, with the nearest known name."""
    if name not in _registry and name not in attention_names():
        raise ValueError(unknown("attention", name, attention_names()))
    return _registry[name]


def is_exact(name: str | None) -> bool:
    """Whether a registered function computes the same as `sdpa`."""
    return name in _exact if name in _registry else name in attention_names() and name in _exact


def registered(name: str | None) -> AttentionFunction | AttentionFactory | None:
    """The function or factory that has this name now, or None."""
    return _registry.get(name) if name is not None else None


class Call(NamedTuple):
    """What one block calls: the function or its own module, with these keywords and those that the model fills in."""

    fn: Callable[..., Any]
    filled_in: tuple[str, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Choice:
    """An attention with its options, as `set_attention` was given it. If it is registered it pickles as its name."""

    source: AttentionFunction | AttentionFactory
    name: str | None
    options: Mapping[str, Any]
    exact: bool  # computes what `sdpa` computes
    is_factory: bool
    filled_in: tuple[str, ...]

    @property
    def called(self) -> str:
        """How error messages call it."""
        return self.name or str(getattr(self.source, "__name__", type(self.source).__name__))

    def make(self, config: ViTConfig, block: int) -> Call:
        """What this block calls.

        Raises:
            ValueError: a factory that returns no module, or one that cannot be called as a function is.
        """
        known = {"prefix": config.num_prefix_tokens, "block": block}
        if not self.is_factory:
            fixed = {name: value for name, value in known.items() if name in self.filled_in}
            return Call(self.source, self.filled_in, {**self.options, **fixed})
        module = self.source(config, block, **self.options)
        if not isinstance(module, nn.Module):
            got = type(module).__name__
            raise ValueError(f"block {block}: factory {self.called!r} returned {got}, expected an nn.Module")
        filled_in = _inspect(module.forward, self.called, {}, made=True).filled_in
        return Call(module, filled_in, {name: value for name, value in known.items() if name in filled_in})

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if registered(self.name) is self.source:
            del state["source"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "source" not in state:
            now = choose_again(state["name"], state["options"])
            if (now.is_factory, now.filled_in) != (state["is_factory"], state["filled_in"]):
                raise ValueError(
                    f"attention {now.name!r} takes other keywords than the one that was pickled, which the model"
                    " would not fill in: register that one before unpickling, with vit.register_attention"
                )
            state = now.__dict__
        self.__dict__.update(state)


def choose(name_or_fn: AttentionLike, options: Mapping[str, Any]) -> Choice:
    """Decide what `set_attention(name_or_fn, **options)` means.

    Raises:
        ValueError: an unknown name, a signature other than that of `vit.attention`, or an unknown option.
    """
    if isinstance(name_or_fn, str):
        name, source = cast("str | None", name_or_fn), get_attention(name_or_fn)
    else:
        source = name_or_fn
        name = next((name for name, fn in _registry.items() if fn is source), None)
    signature = _inspect(source, name or str(getattr(source, "__name__", source)), options)
    return Choice(source, name, dict(options), is_exact(name) and not options, *signature)


def choose_again(name: str, options: Mapping[str, Any]) -> Choice:
    """`choose` for a pickle that holds the name; ValueError if it is not registered here."""
    try:
        return choose(name, options)
    except ValueError as error:
        raise ValueError(f"{error} Register it before unpickling, with vit.register_attention.") from None


class _Signature(NamedTuple):
    """What a function or factory takes."""

    is_factory: bool
    filled_in: tuple[str, ...]  # the keywords that the model fills in


def _inspect(fn: object, name: str, options: Mapping[str, Any] | None = None, made: bool = False) -> _Signature:
    """Read a signature, once. ValueError if `fn` cannot be called with these options (None: they are not known yet).

    With `made`, `fn` is the forward method of a module that a factory made.
    """
    owner = getattr(fn, "__self__", None)
    if isinstance(fn, nn.Module) or (isinstance(owner, nn.Module) and owner.state_dict() and not made):
        # all blocks would share its weights, and checkpoints would not have them
        raise ValueError(f"attention {name!r} is a module: pass its class or a factory (config, block) -> nn.Module")
    if not callable(fn):
        raise ValueError(f"attention must be a registered name or a function, not {fn!r}")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        if inspect.isclass(fn):
            raise ValueError(f"attention {name!r} is a class that cannot make attention modules") from None
        return _Signature(False, ())  # a builtin, such as F.scaled_dot_product_attention; its options are not checked
    is_factory = list(signature.parameters)[:2] == ["config", "block"]
    if inspect.isclass(fn) and not is_factory:
        raise ValueError(f"attention {name!r} is a class: its first two parameters must be named config and block")
    if taken := [parameter for parameter in signature.parameters if parameter in _SETTINGS and not made]:
        raise ValueError(f"attention {name!r}: set_attention itself takes {', '.join(taken)}; rename the option")
    _check_options(name, signature, options or {}, ("config", "block") if is_factory else _PASSED)
    fixed = fn.keywords if isinstance(fn, partial) else {}
    filled_in = tuple(keyword for keyword in FILLED_IN if keyword in signature.parameters and keyword not in fixed)
    filled_in = () if is_factory else filled_in
    bind = signature.bind_partial if options is None else signature.bind
    arguments = {} if is_factory else {"bias": None, **dict.fromkeys(filled_in)}
    try:
        bind(*(("config", "block") if is_factory else "qkv"), **{**arguments, **(options or {})})
    except TypeError as error:
        expected = "(config, block)" if is_factory else "(q, k, v, *, bias=None) or, for a factory, (config, block)"
        raise ValueError(f"attention {name!r} has the signature {signature}, expected {expected}: {error}") from None
    return _Signature(is_factory, filled_in)


def _check_options(name: str, signature: inspect.Signature, options: Mapping[str, Any], passed: tuple) -> None:
    """ValueError for an option that is `passed` by the model itself, or that the function does not have."""
    known = [parameter for parameter in signature.parameters if parameter not in passed]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    for option in options:
        if option in passed:
            raise ValueError(f"attention {name!r}: the model itself passes {option}; rename the option")
        if option not in known and not takes_any:
            raise ValueError(f"attention {name!r} has no option {option!r}; its options: {', '.join(known) or 'none'}")


DEFAULT = choose("sdpa", {})  # of every new model
