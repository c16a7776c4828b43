"""Models optimized for an NVIDIA GPU: blocks of a few fused kernels in bfloat16 or float16.

The rest of this folder is imported when the first of them is made, since it imports PyTorch's compiler.
"""

import torch

from ..attention.flash import wrong_machine

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def missing(dtype: str, device: torch.device) -> str | None:
    """What this machine lacks for a dtype; None if nothing."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU here"
    return wrong_machine(torch.empty(0, dtype=DTYPES[dtype], device=device))
