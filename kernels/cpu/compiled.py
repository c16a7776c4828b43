"""A function compiled once for each shape that it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vit.checks import warn

SHAPES = 8  # of a batch that are compiled, since each takes up to half a minute; others run as they are


class Compiled:
    """`fn(model, x, ...)` by torch.compile, which remembers on disk what it compiled."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        """`fn`: a method of the model's class, not of the model, which would keep itself alive."""
        self.fn = fn
        self.shapes: set[tuple] = set()
        self.broken = False
        self.compiled = torch.compile(fn, dynamic=False, fullgraph=True)

    def __reduce__(self) -> tuple:  # copies compile for themselves
        return Compiled, (self.fn,)

    def __call__(self, model: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """What `fn` gives. Warns once where it cannot be compiled, and runs it as it is from then on."""
        if torch.compiler.is_compiling():  # a part of what is compiled
            return self.fn(model, x, *args)
        shape = (*x.shape, *args)
        if self.broken or (shape not in self.shapes and len(self.shapes) >= SHAPES):
            return self.fn(model, x, *args)
        self.shapes.add(shape)
        from torch import _dynamo as dynamo  # which takes two seconds

        # What PyTorch limits is the sum of all models.
        unlimited = dynamo.config.patch(recompile_limit=2**30, accumulated_recompile_limit=2**30)
        try:
            with torch.no_grad(), unlimited:
                return self.compiled(model, x, *args)
        except dynamo.exc.TorchDynamoException as error:
            self.broken = True
            why = str(error).splitlines()[0]
            warn(f"runs uncompiled, which is slower: is there a C++ compiler, such as g++? The reason: {why}")
            return self.fn(model, x, *args)
