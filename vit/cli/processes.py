"""The processes that torchrun starts, each with a device of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def processes(device: torch.device, strategy: str) -> Iterator[None]:
    """Join the other processes, if torchrun has started several.

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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
