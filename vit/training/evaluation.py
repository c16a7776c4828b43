"""How good a model is on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from .data import Images, loader, shares
from .distributed import rank_and_world, total
from .loss import cross_entropy


@torch.no_grad()
def evaluate(
    called: nn.Module,
    images: Images,
    batch_size: int = 32,
    workers: int = 0,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[dict[str, float], list[str]]:
    """Judge a model on labelled images: the mean loss, the accuracy and the mean of the classes' accuracies.

    Returns:
        The figures, and the errors of images that could not be read, which do not count.
    """
    device = next(called.parameters()).device
    modes = {module: module.training for module in called.modules()}
    called.eval()
    counts, loss, errors = torch.zeros(2, 0), torch.zeros((), device=device), []
    for batch in loader(images, shares(len(images), batch_size, *rank_and_world()), workers, device):
        x, y, w = (tensor.to(device) for tensor in (*batch[:2], batch.weight.float()))
        with context():
            logits = called(x)  # [b, classes]
        loss += (w * cross_entropy(logits, y)).sum()
        right = w * (logits.argmax(dim=1) == y)
        counts = counts if counts.numel() else torch.zeros(2, logits.shape[1], device=device)
        counts.index_add_(1, y, torch.stack([right, w]))  # [2, classes]: right, all
        errors += batch.error
    for module, training in modes.items():
        module.training = training
    right, seen = total(counts)
    if not seen.any():
        why = ", ".join(sorted(set(filter(None, errors)))[:3]) or "there are none"
        raise ValueError(f"no validation image can be used: {why}")
    classes = seen > 0
    return {
        "val_loss": (total(loss) / seen.sum()).item(),
        "accuracy": (right.sum() / seen.sum()).item(),
        "balanced_accuracy": (right[classes] / seen[classes]).mean().item(),
    }, errors
