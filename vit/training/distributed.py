"""One process or many: the loop is the same, with these few functions around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vit.checks import unknown
from vit.model import ViT

STRATEGIES = ("none", "ddp", "fsdp")
_OTHER_FORWARDS = ("forward_features", "forward_intermediates", "forward_packed")


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def union(texts: Iterable[str], device: torch.device) -> set[str]:
    """The texts of all processes: mostly none, so that they are exchanged only if there are any."""
    own = set(filter(None, texts))
    if not dist.is_initialized() or not total(torch.tensor(float(len(own)), device=device)):
        return own
    parts: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return set().union(*parts)


def whole(value: Tensor) -> Tensor:
    """A tensor without its shards: the same in all processes."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def wrap(model: nn.Module, strategy: str, amp: str = "") -> nn.Module:
    """The module to call in the loop.

    Args:
        model: on its device.
        strategy: "none"; "ddp", a copy in each process (PyTorch's DistributedDataParallel); "fsdp", a share of each
            block's weights in each process (FSDP2, arXiv:2304.11277), which changes `model` itself.
        amp: the dtype of products under "fsdp"; gradients are summed in float32.

    Raises:
        ValueError: an unknown strategy, or one that does not fit the number of processes.
    """
    if strategy not in STRATEGIES:
        raise ValueError(unknown("strategy", strategy, STRATEGIES))
    if strategy == "none":
        if rank_and_world()[1] > 1:
            raise ValueError("there are several processes: choose the strategy 'ddp' or 'fsdp'")
        return model
    if not dist.is_initialized():
        raise ValueError(f"strategy {strategy!r} needs processes: start with torchrun --nproc-per-node N -m vit ...")
    if strategy == "ddp":
        return DistributedDataParallel(model)
    # imported here, since it takes two seconds
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, amp) if amp else None, reduce_dtype=torch.float32)
    for block in model.blocks if isinstance(model, ViT) else ():
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for name in _OTHER_FORWARDS if isinstance(model, ViT) else ():
        register_fsdp_forward_method(model, name)
    return model


def precision(amp: str, device: torch.device, strategy: str) -> Callable[[], AbstractContextManager]:
    """Autocast to a dtype such as "bfloat16"; under "fsdp" the layers cast by themselves."""
    if not amp or strategy == "fsdp":
        return nullcontext
    return lambda: torch.autocast(device.type, getattr(torch, amp))


@contextmanager
def summing(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients only after the last of a step's parts."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    if set_sync := getattr(wrapped, "set_requires_gradient_sync", None):  # sharded
        set_sync(last)
    yield
