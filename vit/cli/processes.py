"""The processes that torchrun starts: each has a device of its own, and they share a command's images."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist

from vit.training.distributed import rank_and_world

T = TypeVar("T")


@contextmanager
def processes(device: torch.device, strategy: str) -> Iterator[None]:
    """Join the other processes to train with them, if torchrun has started several.

    Args:
        device: this process's own.
        strategy: "none" without torchrun.

    Raises:
        ValueError: a strategy without torchrun, several processes without one.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy != "none" and "RANK" not in os.environ:
        raise ValueError(f"--strategy {strategy} needs torchrun --nproc-per-node N -m vit finetune ...")
    if strategy == "none" and world > 1:
        raise ValueError(f"torchrun has started {world} processes: choose --strategy ddp or fsdp")
    if strategy == "none":
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # errors are exchanged as texts, by way of the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: the others would wait for this process instead of ending


@contextmanager
def sharing() -> Iterator[None]:
    """Join the other processes to share images with them, if torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # One process may wait for another's files as long as these take; torchrun ends all if one has ended badly.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(count: int, size: int) -> list[int]:
    """The numbers of this process's images: the processes take blocks of `size` in turn, one process takes all.

    With `size` the batch size, each batch has the images that it has in one process, and so the same rounding.
    """
    rank, world = rank_and_world()
    return [i for i in range(count) if i // size % world == rank]


def gather(own: list[T]) -> list[T]:
    """The items of all processes, the first process's first. No process goes on before all have called this.

    Raises:
        OSError: another process has ended.
    """
    world = rank_and_world()[1]
    if world == 1:
        return own
    parts: list[list[T]] = [[] for _ in range(world)]
    try:
        dist.all_gather_object(parts, own)
    except RuntimeError as error:
        raise OSError("another process has ended before its work was done") from error
    return [item for part in parts for item in part]


def in_order(results: Iterator[T], count: int, size: int) -> Iterator[T]:
    """In the first process the results of all images in their order, as soon as they are there; in the others none.

    Args:
        results: one for each image of this process's `share(count, size)`.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield from results
        return
    for _ in range(0, count, world * size):
        block = gather(list(islice(results, size)))
        yield from block if rank == 0 else ()
