"""Products as `torch.compile` sees them: one operator that takes the number of a layer.

PyTorch does not cache a compiled graph on disk that holds weights in oneDNN's layout, and refuses such weights as
inputs of a graph. A number in a tensor is accepted, so all models of one shape share what was compiled for the first.
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
    """A layer with its weight in oneDNN's layout, which a compiled graph finds by its number.

    That layout is this machine's, so copies and pickles hold the weight in rows.
    """

    out_features: int
    number: Tensor
    packed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._take_number()

    def _take_number(self) -> None:  # copies get their own
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
        """A weight [N, K] in oneDNN's layout."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """A copy of the weight [N, K], in rows."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        gelu: str | None = None,
    ) -> Tensor:
        """[..., K] -> [..., N], of `dtype`; through a GELU if `gelu` is "none" or "tanh", its approximation."""
        if torch.compiler.is_exporting():
            raise ValueError("an optimized model cannot be exported: export the original model")
        if torch.compiler.is_compiling():
            return torch.ops.vit.numbered_layer(self.number, x, residual, self.out_features, self.dtype(dtype), gelu)
        return self.compute(x, residual, dtype, gelu)

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """The dtype of what `compute` returns."""
        return wanted

    @abstractmethod
    def compute(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype, gelu: str | None) -> Tensor:
        """What `forward` returns."""


def _run(
    number: Tensor, x: Tensor, residual: Tensor | None, width: int, dtype: torch.dtype, gelu: str | None
) -> Tensor:
    return _layers[int(number)].compute(x, residual, dtype, gelu)


def _shape(
    number: Tensor, x: Tensor, residual: Tensor | None, width: int, dtype: torch.dtype, gelu: str | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], width, dtype=dtype)


# Not `custom_op`, which takes 10 us a call: there are 72 calls in 20 ms.
_library = torch.library.Library("vit", "FRAGMENT")
_library.define(
    "numbered_layer(Tensor number, Tensor x, Tensor? residual, int width, ScalarType dtype, str? gelu) -> Tensor"
)
_library.impl("numbered_layer", _run, "CPU")
torch.library.register_fake("vit::numbered_layer", _shape, lib=_library)
