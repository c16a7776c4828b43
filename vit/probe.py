"""What frozen features can tell apart, without training: k nearest neighbours and ridge regression.

Letters: n training images, m test images, C classes, D numbers per image; further ones as in `vit.model`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import ViT

BLOCKS = 4  # whose class tokens `extract` returns
SIMILARITIES = 2**25  # that `knn` keeps in memory at a time
CONSTANT = 1e-6  # a feature whose standard deviation is below this share of the largest one tells nothing
POOLS = {"class": "token", "patch mean": "avg", "class + patch mean": "token_avg"}  # features -> global_pool


@torch.no_grad()
def extract(model: ViT, images: Tensor | Sequence[Tensor]) -> Tensor:
    """The class tokens of the last four blocks, then the mean of the last block's patch tokens.

    Each token has passed the model's final norm, those of earlier blocks too, as in DINOv2's linear evaluation
    (arXiv:2304.07193); with `fc_norm` the norm follows the mean. `columns` names the parts.

    [B, in_chans, H, W] images, or a list of [in_chans, H_i, W_i] -> [B, 5 D], or [B, (depth + 1) D] if depth < 4.
    """
    blocks = range(-min(BLOCKS, len(model.blocks)), 0)
    if isinstance(images, Tensor):
        found = model.forward_intermediates(images, blocks, norm=True, return_prefix_tokens=True)
        parts = [prefix[:, 0] for _, prefix in found] + [found[-1][0].mean(dim=(2, 3))]  # each [B, D]
    else:
        packed = model.forward_intermediates_packed(images, blocks, norm=True, return_prefix_tokens=True)
        parts = [torch.stack([prefix[0] for _, prefix in block]) for block in packed]  # each [B, D]
        parts += [torch.stack([patches.mean(dim=(1, 2)) for patches, _ in packed[-1]])]
    return torch.cat([model.fc_norm(part) for part in parts], dim=1)  # `norm` or `fc_norm` is the identity


def columns(model: ViT) -> dict[str, slice]:
    """Kinds of features by name -> their columns in what `extract` returns."""
    D, n = model.config.embed_dim, min(BLOCKS, len(model.blocks))
    start, middle, end = (n - 1) * D, n * D, (n + 1) * D
    found = {"class": slice(start, middle), "patch mean": slice(middle, end), "class + patch mean": slice(start, end)}
    several = {f"last {n} class": slice(0, middle), f"last {n} class + patch mean": slice(0, end)}
    return found | (several if n > 1 else {})


def knn(
    train: Tensor, labels: Tensor, test: Tensor, k: Sequence[int], temperature: float = 0.07, *, classes: int
) -> dict[int, Tensor]:
    """Votes of the k nearest training images by cosine similarity, each weighted by exp(similarity / temperature).

    From Wu et al. (arXiv:1805.01978), as in DINO (arXiv:2104.14294). ValueError for a k above n or below 1.

    Features [n, D] with classes [n] from 0 to C - 1, and features [m, D] -> for each k votes [m, C].
    """
    check(train, labels, classes, test)
    if not k or min(k) < 1 or max(k) > len(train):
        raise ValueError(f"k must lie between 1 and {len(train)}, the number of training images, not {list(k)}")
    votes: dict[int, list[Tensor]] = {number: [] for number in k}
    train = F.normalize(train.float(), dim=1)
    for part in F.normalize(test.float(), dim=1).split(max(1, SIMILARITIES // len(train))):
        nearest, index = (part @ train.T).topk(max(k), dim=1)  # each [part, largest k], the nearest first
        weights, voted = (nearest / temperature).exp(), labels[index]
        for number in k:
            empty = torch.zeros(len(part), classes)
            votes[number].append(empty.scatter_add_(1, voted[:, :number], weights[:, :number]))
    return {number: torch.cat(parts) for number, parts in votes.items()}


def ridge(train: Tensor, labels: Tensor, lambdas: Sequence[float], classes: int) -> dict[float, tuple[Tensor, Tensor]]:
    """Linear classifiers by least squares: targets 1 for an image's class and -1 for the others.

    They minimise |X w + b - y|^2 + lambda |w|^2 on features X that are standardised by the training images' mean and
    standard deviation: lambda is scikit-learn's alpha. One eigendecomposition of a [D, D] matrix, or of [n, n] if that
    is smaller, serves every lambda; all in float64.

    Features [n, D] with classes [n] from 0 to C - 1 -> for each lambda weight [C, D] and bias [C], for raw features x:
    the scores are x @ weight.T + bias.
    """
    check(train, labels, classes)
    if not lambdas or not min(lambdas) > 0:
        raise ValueError(f"lambda must be above 0, not {list(lambdas)}")
    x, y = train.double(), 2 * F.one_hot(labels, classes).double() - 1  # [n, D], [n, C]
    mean, std, offset = x.mean(dim=0), x.std(dim=0, correction=0), y.mean(dim=0)
    std = std.masked_fill(std <= CONSTANT * std.max(), torch.inf)  # a constant feature gets the weight 0
    x, y = (x - mean) / std, y - offset
    if len(x) < x.shape[1]:  # (X^T X + lambda)^-1 X^T y = X^T (X X^T + lambda)^-1 y
        values, vectors = torch.linalg.eigh(x @ x.T)  # [n], [n, n]
        left, right = x.T @ vectors, vectors.T @ y  # [D, n], [n, C]
    else:
        values, vectors = torch.linalg.eigh(x.T @ x)  # [D], [D, D]
        left, right = vectors, vectors.T @ (x.T @ y)  # [D, D], [D, C]
    weights = {value: ((left / (values.clamp(min=0) + value)) @ right).T / std for value in lambdas}  # each [C, D]
    return {value: (weight, offset - weight @ mean) for value, weight in weights.items()}


def check(train: Tensor, labels: Tensor, classes: int, *others: Tensor) -> None:
    """Refuse features that are not finite, and labels that do not fit them."""
    if train.ndim != 2 or labels.shape != train.shape[:1] or len(labels) == 0:
        raise ValueError(f"expected features [n, D] and labels [n], got {list(train.shape)} and {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    if not all(x.isfinite().all() for x in (train, *others)):
        raise ValueError("some features are NaN or infinite")


def fold(model: ViT, features: str, weight: Tensor, bias: Tensor, categories: Sequence[str]) -> ViT:
    """A copy of the model whose logits are the scores of a linear probe, [C, D] and [C], on `features` of POOLS."""
    result: Any = copy.deepcopy(model)
    result.config = model.config.override(global_pool=POOLS[features])
    result.head_dist = None
    result.reset_classifier(len(categories))
    result.head.load_state_dict({"weight": weight, "bias": bias})
    result.categories = list(categories)
    return result
