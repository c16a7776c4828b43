"""Position embeddings at any size: the trained grid, resampled on every call from the original.

Nothing is cached and the original is never overwritten, so 224 -> 384 -> 224 is the identity and a gradient
taken at one size trains the embedding that is stored at another. Grids are compared, never token counts:
7x28 patches are as many as 14x14 and not the same.

Resampling is linear and separable: new = R E C^T, with one small matrix of weights for the rows of the grid and one
for its columns. A rule is how those weights are made. `torch.nn.functional.interpolate` has the same numbers but
cannot be trained through `torch.compile` at changing sizes; products of matrices can.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def resample_position_embedding(
    embedding: Tensor, stored: tuple[int, int], wanted: tuple[int, int], rule: str = "timm"
) -> Tensor:
    """Resample the patches' position embedding to another grid, in float32.

    Args:
        embedding: [1, h*w, D], the rows of the patch tokens alone, in reading order.
        stored: (h, w), the grid of `embedding`.
        wanted: (h', w'), the grid to resample to.
        rule: a name in `RULES`; projects disagree on antialiasing and alignment, by several per cent of the result.

    Returns:
        [1, h'*w', D] in `embedding`'s dtype; `embedding` itself where the grids are the same.
    """
    # An exported graph serves many grids, so it must not even ask whether its example has the stored one.
    # Resampling to the stored grid is the identity to the bit, so this changes no number.
    if not torch.compiler.is_exporting() and wanted == stored:
        return embedding
    with _without_autocast(embedding.device.type):
        rows, columns = (RULES[rule](*sizes, embedding.device) for sizes in zip(stored, wanted))  # [h', h], [w', w]
        grid = embedding[0].float()  # [h*w, D]
        grid = rows @ grid.reshape(stored[0], -1)  # [h', w*D]
        grid = columns @ grid.reshape(wanted[0], stored[1], -1)  # [h', w', D]
    return grid.reshape(1, wanted[0] * wanted[1], -1).to(embedding.dtype)  # [1, h'*w', D]


def _without_autocast(device: str) -> AbstractContextManager:
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def bicubic_antialiased(old: int, new: int, device: torch.device) -> Tensor:
    """timm's rule: Keys' cubic convolution (1981, Eq. 15, a = -1/2), widened when shrinking so that nothing is skipped.

    Returns:
        [new, old] float32, each row the weights of the old samples in one new sample; rows sum to 1.
    """
    centres = (torch.arange(new, device=device, dtype=torch.float32) + 0.5) * (old / new)  # [new], in old samples
    samples = torch.arange(old, device=device, dtype=torch.float32) + 0.5  # [old]
    stretch = torch.full((), old / new, device=device, dtype=torch.float32).clamp(min=1)  # 1 when enlarging
    x = (samples - centres[:, None]).abs() / stretch  # [new, old], distances in widths of the filter
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(dim=1, keepdim=True)


# How many samples there are and how many there should be -> [new, old] weights.
RULES: dict[str, Callable[[int, int, torch.device], Tensor]] = {"timm": bicubic_antialiased}
