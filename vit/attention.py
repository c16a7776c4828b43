"""Attention, and the one line in which it is replaced.

An attention function is `fn(q, k, v, *, bias=None) -> out`:

    q, k, v   [B, A, T, d]    queries, keys and values of A heads, each d wide, for T tokens
    bias      broadcastable to [B, A, T, T], added to the scores before the softmax, or None. A query whose keys all
              have -inf has no softmax: `reference` gives NaN there, `sdpa` 0
    out       [B, A, T, d]    the values, averaged with weights softmax(q k^T / sqrt(d) + bias)

    vit.register_attention("mine", fn)
    model.set_attention("mine")

The model gives q, k and v; a bias comes from whoever calls a function to build another on it, as in
`sdpa(q, k, v, bias=distances)`. A function may take more keywords, which are then given to it: `grid` (h, w), `prefix`
(P, the tokens before the patches), `block` (the block's number), and `lengths`: packed images are handed over in one
call, B = 1, T the sum of `lengths`, `grid` a list of pairs, and each image's tokens attend to one another only. A
function without `lengths` is called image by image. Its other keywords are options: `set_attention("mine", window=7)`.

Attention with weights of its own is a factory `(config, block) -> nn.Module`, an nn.Module class for example, called
once per block; the module is called as a function is.
"""

import importlib
import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import fit_bias, parameters, unknown

AttentionFunction = Callable[..., Tensor]
AttentionFactory = Callable[..., nn.Module]

GIVEN = ("lengths", "grid", "prefix", "block")  # keywords that the model fills in for a function that names them


def reference(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Attention as Eq. 1 of arXiv:1706.03762 writes it; keeps all T*T weights in memory."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, A, T, T]
    if bias is not None:
        scores = scores + fit_bias(q, k, bias)
    weights = torch.softmax(scores, dim=-1)  # [B, A, T, T], each row sums to 1
    return weights @ v  # [B, A, T, d]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The same numbers from PyTorch's fused kernels, which never hold the T*T weights. The default."""
    bias = None if bias is None else fit_bias(q, k, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, A, T, d]


_registry: dict[str, AttentionFunction | AttentionFactory] = {"reference": reference, "sdpa": sdpa}
_exact = {"reference", "sdpa"}


def register_attention(
    name: str, fn: AttentionFunction | AttentionFactory, *, exact: bool = False, overwrite: bool = False
) -> None:
    """Give an attention function or factory a name, so that `model.set_attention(name)` finds it.

    Args:
        name: under which checkpoints and pickles remember it.
        fn: as described above.
        exact: it gives, without options, softmax(q k^T / sqrt(d) + bias) v, as `sdpa` does. Attention maps of other
            functions carry a warning, and so do checkpoints in layouts that cannot name them.
        overwrite: replace what has the name.

    Raises:
        ValueError: the name is taken and `overwrite` is not set, or `fn` cannot be called as described.
    """
    if not isinstance(name, str):
        raise ValueError(f"an attention's name must be a text, not {name!r}")
    if name in attention_names() and not overwrite:
        raise ValueError(f"attention {name!r} is registered already; overwrite=True replaces it")
    check_callable(fn, name)
    _registry[name] = fn
    (_exact.add if exact else _exact.discard)(name)


def attention_names() -> list[str]:
    """The registered names, sorted, those of `vit.kernels` too."""
    importlib.import_module("vit.kernels")  # the faster backends register themselves there
    return sorted(_registry)


def get_attention(name: str) -> AttentionFunction | AttentionFactory:
    """The function or factory of a registered name; ValueError for any other, with the nearest known one."""
    if name not in _registry and name not in attention_names():
        raise ValueError(unknown("attention", name, attention_names()))
    return _registry[name]


def is_exact(name: str | None) -> bool:
    """Whether a name is that of a function that gives the same numbers as `sdpa`."""
    return name in _exact if name in _registry else name in attention_names() and name in _exact


def registered(name: str | None) -> AttentionFunction | AttentionFactory | None:
    """What has this name now."""
    return _registry.get(name) if name is not None else None


def name_of(fn: Callable) -> str | None:
    """The name that a function or factory is registered under."""
    return next((name for name, one in _registry.items() if one is fn), None)


def is_factory(fn: Callable) -> bool:
    """Whether it makes attention modules: its first two parameters are `config` and `block`."""
    return list(parameters(fn))[:2] == ["config", "block"]


def given(fn: Callable) -> tuple[str, ...]:
    """The keywords that the model fills in for this function."""
    return tuple(keyword for keyword in GIVEN if keyword in parameters(fn))


def check_callable(fn: object, name: str, options: dict[str, object] | None = None) -> None:
    """ValueError for no function or factory as described, or one without these options (None: they are left open)."""
    if isinstance(fn, nn.Module):  # all blocks would share its one set of weights, and checkpoints would not have them
        raise ValueError(f"attention {name!r} is a module: give its class or a factory (config, block) -> nn.Module")
    if not callable(fn):
        raise ValueError(f"attention must be a registered name or a function, not {fn!r}")
    if taken := [option for option in options or {} if option in ("q", "k", "v", "config", *GIVEN)]:
        raise ValueError(f"attention {name!r} is given {', '.join(taken)} by the model: give the option another name")
    factory = is_factory(fn)
    if inspect.isclass(fn) and not factory:
        raise ValueError(f"attention {name!r} is a class: its first two parameters must be named config and block")
    how = "fn(config, block)" if factory else "fn(q, k, v, *, bias=None), or a factory as fn(config, block)"
    arguments = {} if factory else {"bias": None, **dict.fromkeys(given(fn))}
    signature = inspect.signature(fn) if parameters(fn) else inspect.Signature()
    bind = signature.bind_partial if options is None else signature.bind  # an option may be required
    try:
        bind(*(("config", "block") if factory else "qkv"), **{**arguments, **(options or {})})
    except (TypeError, ValueError) as error:
        also = f" with options {', '.join(options)}" if options else ""
        known = [p for p in signature.parameters if p not in ("q", "k", "v", "bias", "config", "block", "self", *GIVEN)]
        hint = f"; its options: {', '.join(known)}" if known else ""
        raise ValueError(f"attention {name!r} must be callable as {how}{also}: {error}{hint}") from None
