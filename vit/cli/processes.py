"""The processes that torchrun starts, each with a device of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from . import options


@contextmanager
def processes(device: str, strategy: str) -> Iterator[torch.device]:
    """Join the other processes, if torchrun has started several, and yield this one's device.

    Args:
        device: a device of this machine, or "auto": a GPU where there is one.
        strategy: "none" without torchrun.

    Raises:
        ValueError: a strategy without torchrun, several processes without one, or a device that cannot be used.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy != "none" and "RANK" not in os.environ:
        raise ValueError(f"--strategy {strategy} needs torchrun --nproc-per-node N -m vit finetune ...")
    if strategy == "none" and world > 1:
        raise ValueError(f"torchrun has started {world} processes: choose --strategy ddp or fsdp")
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    found = options.device(device)
    if strategy == "none":
        yield found
        return
    if found.type == "cuda":
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield found
    finally:
        dist.destroy_process_group()
