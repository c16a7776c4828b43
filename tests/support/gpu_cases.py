"""What the tests of models and kernels for a GPU share.

Where there is no CUDA the kernels run in Triton's interpreter, one tile at a time in numpy: in float32 and float16,
since it computes nonsense in bfloat16. What only a GPU can show is skipped there.
"""

import importlib.util

import pytest
import torch
from helpers import FLOAT32, randomize

import vit

torch.backends.cudnn.allow_tf32 = False  # in the convolution of the models that are compared with
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
NAMES = ["bfloat16", "float16"] if CUDA else ["float16"]
SMALL = {"img_size": 64, "embed_dim": 96, "num_heads": 3, "depth": 2, "num_classes": 10}
LOSS = 4e-3  # of float16, relative to the largest; bfloat16 has three bits less

MARKS = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
interpreter_only = pytest.mark.skipif(CUDA, reason="the kernels are compiled here, not interpreted")


def loss(dtype: torch.dtype | str) -> float:
    return {torch.float32: FLOAT32, torch.float16: LOSS, "float16": LOSS}.get(dtype, 8 * LOSS)


def model(**changes: object) -> vit.ViT:
    """A small one, with weights that matter."""
    made = vit.create_model("vit_small_patch16_224", **(SMALL | changes))
    return randomize(made).eval().to(DEVICE)
