"""Products as `torch.compile` sees them: one operator, which is told by a number whose product it is.

A compiled graph that holds weights in oneDNN's layout is not kept on disk, and one that would take them as inputs is
refused. A number it takes, in a tensor, so that all models of one shape share what was compiled for the first of them.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_numbers = count()
_layers: WeakValueDictionary[int, NumberedLayer] = WeakValueDictionary()


class NumberedLayer(nn.Module):
    """A layer that computes by itself, and goes by its number where a graph is compiled.

    Its weight lies in oneDNN's layout, which is this machine's: copies and pickles go by rows.
    """

    out_features: int
    number: Tensor
    packed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._take_number()

    def _take_number(self) -> None:  # copies have one of their own
        self.number = torch.tensor(next(_numbers))
        _layers[int(self.number)] = self

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_buffers": {**self._buffers, "packed": self.weight}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._take_number()
        self.packed = self.pack(self.packed)

    @staticmethod
    @abstractmethod
    def pack(weight: Tensor) -> Tensor:
        """[N, K] -> the same in oneDNN's layout."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """[N, K], a copy in rows."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        gelu: str | None = None,
    ) -> Tensor:
        """[..., K] -> [..., N], of `dtype`; with `gelu` "none" or "tanh" (how PyTorch approximates) through a GELU."""
        if torch.compiler.is_exporting():
            raise ValueError("an optimized model cannot be exported: export the model that it was made of")
        if torch.compiler.is_compiling():
            return torch.ops.vit.numbered_layer(self.number, x, residual, self.out_features, self.dtype(dtype), gelu)
        return self.compute(x, residual, dtype, gelu)

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """Of what `compute` gives."""
        return wanted

    @abstractmethod
    def compute(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype, gelu: str | None) -> Tensor:
        """What `forward` gives."""


def _run(
    number: Tensor, x: Tensor, residual: Tensor | None, width: int, dtype: torch.dtype, gelu: str | None
) -> Tensor:
    return _layers[int(number)].compute(x, residual, dtype, gelu)


def _shape(
    number: Tensor, x: Tensor, residual: Tensor | None, width: int, dtype: torch.dtype, gelu: str | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], width, dtype=dtype)


# Not by `custom_op`, which takes 10 us a call, and there are 72 calls in 20 ms.
_library = torch.library.Library("vit", "FRAGMENT")
_library.define(
    "numbered_layer(Tensor number, Tensor x, Tensor? residual, int width, ScalarType dtype, str? gelu) -> Tensor"
)
_library.impl("numbered_layer", _run, "CPU")
torch.library.register_fake("vit::numbered_layer", _shape, lib=_library)
