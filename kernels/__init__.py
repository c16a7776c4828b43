"""Faster ways to compute the same numbers, each beside a plain twin that it is tested against.

Importing this package registers the attention backends that it holds; `vit.attention` does so when it is asked for
a name that it does not know.
"""

if __name__ == "vit.kernels":  # transformers asks for a package `kernels`, and in a checkout finds this folder
    from vit.registry import register_attention

    from .attention.backends import BACKENDS, available, explain
    from .base import OptimizedViT
    from .files import load, save
    from .optimize import optimize

    __all__ = ["OptimizedViT", "available", "explain", "load", "optimize", "save"]

    for _name, _fn in BACKENDS.items():
        register_attention(_name, _fn, exact=True)
