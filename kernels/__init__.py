"""Faster ways to compute the same numbers, each beside a plain twin that it is tested against.

Importing this package registers its attention backends; `vit` imports it when it meets a name that is not registered.
"""

if __name__ == "vit.kernels":  # in a checkout, transformers imports this folder as `kernels`
    from vit.registry import register_attention

    from .attention.backends import BACKENDS, available, explain
    from .base import OptimizedViT
    from .files import load, save
    from .optimize import optimize

    __all__ = ["OptimizedViT", "available", "explain", "load", "optimize", "save"]

    for _name, _fn in BACKENDS.items():
        register_attention(_name, _fn, exact=True)
