"""Position embeddings at any size: on every call, the embedding is resampled from the grid it was trained at.

Nothing is cached and the original is never overwritten, so 224 -> 384 -> 224 is the identity, and a gradient taken at
one size trains the embedding stored at another. Grids are compared, never token counts: 7x28 and 14x14 patches have
the same count.

Resampling multiplies from both sides: for each channel, new = R G C^T, where G is the stored h x w grid, R [h', h]
mixes its rows and C [w', w] its columns. A rule defines these matrices. `torch.nn.functional.interpolate` gives the
same numbers but cannot be trained through `torch.compile` at changing sizes; matrix products can.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor


def resample_position_embedding(
    embedding: Tensor, stored: tuple[int, int], wanted: tuple[int, int], rule: str = "timm"
) -> Tensor:
    """Resample the patches' position embedding to another grid, in float32.

    Args:
        embedding: [1, h*w, D], the rows of the patch tokens only, in reading order.
        stored: (h, w), the grid of `embedding`.
        wanted: (h', w'), the grid to resample to.
        rule: a name in `RULES`. Projects differ in antialiasing and alignment, by several per cent of the result.

    Returns:
        [1, h'*w', D] in `embedding`'s dtype; `embedding` itself if the grids are the same.
    """
    same = _equal(stored, wanted)
    if same:
        return embedding
    with without_autocast(embedding.device.type, later=same is None or torch.compiler.is_exporting()):
        matrices = [RULES[rule](*sizes, embedding.device) for sizes in zip(stored, wanted)]
        rows, columns = matrices if same is False else _unless_stored(matrices, stored, wanted)  # [h', h], [w', w]
        grid = embedding[0].float()  # [h*w, D]
        grid = rows @ grid.reshape(stored[0], -1)  # [h', w*D]
        grid = columns @ grid.reshape(wanted[0], stored[1], -1)  # [h', w', D]
    grid = grid.reshape(1, wanted[0] * wanted[1], -1)  # [1, h'*w', D]
    return grid if embedding.dtype == torch.float32 else grid.to(embedding.dtype)  # an export would assert the dtype


def _equal(stored: tuple[int, int], wanted: tuple[int, int]) -> bool | None:
    """Whether the grids are the same; None in an exported or traced graph that serves many grids.

    Such a graph must not branch on the example's grid: `_unless_stored` puts the condition into the graph instead.
    """
    if torch.jit.is_tracing():
        return None  # the sides are tensors
    if not torch.compiler.is_exporting():
        return wanted == stored
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    if any(statically_known_true(new != old) for old, new in zip(stored, wanted)):
        return False
    return True if all(statically_known_true(new == old) for old, new in zip(stored, wanted)) else None


def _unless_stored(matrices: list[Tensor], stored: tuple[int, int], wanted: tuple[int, int]) -> list[Tensor]:
    """The matrices, or identities if the grid is the stored one: the form of `if` that a graph can hold.

    The rule "dinov2" needs it, since its matrices are not identities there. Those of all other rules are, but only if
    the backend that runs the exported graph rounds as PyTorch does.
    """
    device = matrices[0].device
    same = [torch.full((), new, device=device) == old for old, new in zip(stored, wanted)]
    identities = [torch.eye(*m.shape, dtype=m.dtype, device=device) for m in matrices]
    return [torch.where(same[0] & same[1], i, m) for i, m in zip(identities, matrices)]


def without_autocast(device: str, later: bool = False) -> AbstractContextManager:
    """A context in which autocast leaves float32 alone; none where it is off, since an exported graph would keep it.

    `later` makes it in any case: for graphs that may be run under autocast.
    """
    active = device != "meta" and (later or torch.is_autocast_enabled(device))
    return torch.autocast(device, enabled=False) if active else nullcontext()


# The rules: (number of old samples, number of new samples) -> [new, old] float32. Each row has the weights of the old
# samples in one new sample and sums to 1. Both numbers may be symbols of a traced graph, hence no `if` and no `max`.


def bicubic_antialiased(old: int, new: int, device: torch.device) -> Tensor:
    """timm's rule: when shrinking, the filter is widened so that no sample is skipped; it is cut off at the border.

    DINOv2's models with registers were trained with this rule, too (antialiasing, and an offset of 0).
    """
    step = _ratio(old, new, device)
    centres = (_count(new, device) + 0.5) * step  # [new], in old samples
    samples = _count(old, device) + 0.5  # [old]
    stretch = step.clamp(min=1)  # 1 when enlarging
    weights = cubic((samples - centres[:, None]).abs() / stretch, a=-0.5)  # [new, old]
    return weights / weights.sum(dim=1, keepdim=True)


def bicubic(old: int, new: int, device: torch.device, tenths: int = 0) -> Tensor:
    """PyTorch's `interpolate(mode="bicubic")`, called with a size, as in transformers' ViT and DINOv2.

    The original DINO and DINOv2 call it with a factor, (new + 0.1) / old, so that rounding does not lose a sample, and
    PyTorch uses that factor to place the samples. So an offset of one of the `tenths` moves every sample, even at
    new == old, where these models do not resample.
    """
    return _clamped((_count(new, device) + 0.5) * _ratio(10 * old, 10 * new + tenths, device) - 0.5, old)


def bicubic_aligned(old: int, new: int, device: torch.device) -> Tensor:
    """torchvision's rule: the same with `align_corners=True`. torchvision applies it to squares, when loading."""
    return _clamped(_aligned(old, new, device), old)


def linear_aligned(old: int, new: int, device: torch.device) -> Tensor:
    """The rule of google-research/vision_transformer's loader: `scipy.ndimage.zoom(order=1)`.

    One difference: for some sizes (16 -> 30, 24 -> 22 ...) scipy rounds the last position to beyond the border and
    returns zeros there. Here the last sample is the border's.
    """
    distances = (_aligned(old, new, device)[:, None] - _count(old, device)).abs()  # [new, old]
    return (1 - distances).clamp(min=0)


def cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution (1981, Eq. 15 for a = -1/2) at distances x >= 0: exactly 1 at 0, and 0 at 1, 2 ..."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _ratio(a: int, b: int, device: torch.device) -> Tensor:
    """a / b in float32: of tensors, since runtimes such as OpenVINO have no quotient of symbols."""
    numerator, denominator = (torch.full((), n, device=device, dtype=torch.float32) for n in (a, b))
    return numerator / denominator


def _count(n: int, device: torch.device) -> Tensor:
    """0, 1 ... n - 1 in float32."""
    return torch.arange(n, device=device, dtype=torch.float32)


def _aligned(old: int, new: int, device: torch.device) -> Tensor:
    """[new] positions in old samples, from the first to the last; a single one is at the first."""
    last = torch.full((), new - 1, device=device, dtype=torch.float32).clamp(min=1)
    return _count(new, device) * (old - 1) / last  # divide last: i * (rounded step) could end just beyond the border


def _clamped(positions: Tensor, old: int) -> Tensor:
    """[new] positions in old samples -> [new, old] cubic weights of the four nearest, with the border repeated outside.

    PyTorch's coefficient without antialiasing is -3/4.
    """
    taps = positions.floor()[:, None] + _count(4, positions.device) - 1  # [new, 4], old samples around each position
    weights = cubic((positions[:, None] - taps).abs(), a=-0.75)  # [new, 4]
    hits = taps.clamp(0, old - 1)[:, :, None] == _count(old, positions.device)  # [new, 4, old], one in each row
    return (weights[:, :, None] * hits).sum(dim=1)  # [new, old]


RULES: dict[str, Callable[[int, int, torch.device], Tensor]] = {
    "timm": bicubic_antialiased,
    "transformers": bicubic,
    "torchvision": bicubic_aligned,
    "jax": linear_aligned,
    "dinov2": partial(bicubic, tenths=1),
}
