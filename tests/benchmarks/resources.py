"""What the GPU kernels take of a multiprocessor, as compiled for Hopper: no GPU is needed.

    python tests/benchmarks/resources.py [--width 384] [--json out.json]

For each kernel and each layout in `vit.kernels.gpu.tiles`: registers of a thread (255 at most), bytes a thread spills
out of them, shared memory of a program (227 KiB at most), whether products go through Hopper's own instruction (wgmma),
and how many of it are in the code.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vit.kernels.attention import flash_kernels
from vit.kernels.gpu import triton_kernels
from vit.kernels.gpu.tiles import TILES, Tile

POINTERS = {
    **dict.fromkeys(("bias", "sums", "bias1", "sums1", "bias2", "lse"), "*fp32"), "images": "*u8",
    **dict.fromkeys(("q", "k", "v", "out", "positions"), "*bf16"),
}  # fmt: skip


def known(kernel: str, width: int, tile: Tile) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """In a ViT of this width, the values that a kernel is compiled for, and the tiles in which it moves matrices."""
    R, C, E = tile.R, tile.C, tile.E
    if kernel == "linear":
        values = {"E": E, "N": 3 * width, "K": width, "GELU": "", "residual": None}
        return {"R": R, "C": C, **values}, {"x": [R, E], "weight": [C, E], "out": [R, C]}
    if kernel == "mlp":
        E, values = width // 3, {"H": 4 * width, "D": width, "GELU": "erf", "RESIDUAL": True}
        return {"R": R, "C": C, **values}, {"x": [R, E], "weight1": [C, E], "weight2": [E, C], "out": [R, E]}
    return {"R": R, "C": C, "E": E, "p": 16, "K": 768, "D": width}, {"weight": [C, E]}


def compiled(kernel: Any, constants: dict[str, Any], matrices: dict[str, list[int]], warps: int, stages: int) -> Any:
    """The machine code for compute capability 9.0 and bfloat16, with rows on multiples of 16 bytes."""
    signature: dict[str, Any] = {}
    values: dict[tuple, Any] = {}
    attributes: dict[tuple, Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name == "pixel_stride":
            signature[name], values[i,] = "constexpr", constants.get(name, 1)
        elif name in matrices:
            signature[name] = f"tensordesc<bf16{matrices[name]}>".replace(" ", "")
        elif name.endswith("strides"):
            signature[name], values[i, 3] = ("i32", "i32", "i32", "constexpr"), 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        else:
            signature[name] = POINTERS.get(name, "fp32" if name in ("eps", "scale") else "i32")
            if name in POINTERS or name.endswith("stride"):
                attributes[i,] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(ASTSource(kernel, signature, values, attributes), GPUTarget("cuda", 90, 32), options)


def resources(code: Any) -> dict[str, Any]:
    """What the compiler says of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": code.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", code.asm["ptx"])),
    }  # fmt: skip


Case = tuple[str, Any, dict[str, Any], dict[str, list[int]], Any]  # label, kernel, constants, matrices, layout


def cases(width: int) -> list[Case]:
    """Attention, and every layout of the others."""
    tile = flash_kernels.launch(64, flash_kernels.torch.bfloat16)
    constants = {"d": 64, "E": 64, "R": tile.R, "C": tile.C, "bias": None}
    found: list[Case] = [("attention", flash_kernels.forward_kernel, constants, {}, tile)]
    for (name, few), tiles in TILES.items():
        kernel, label = getattr(triton_kernels, f"{name}_kernel"), f"{name}, few rows" if few else name
        found += [(label, kernel, *known(name, width, tile), tile) for tile in tiles]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="D, the tokens' width")
    parser.add_argument("--json", type=Path, help="write the table here too")
    args = parser.parse_args()
    rows = []
    print(f"{'kernel':20} {'layout':44} {'registers':>9} {'spilled':>8} {'shared':>8} {'wgmma':>6}")
    for label, kernel, constants, matrices, tile in cases(args.width):
        layout = ", ".join(f"{key} {value}" for key, value in tile._asdict().items())
        row = {"kernel": label, "layout": tile._asdict()}
        try:
            row |= resources(compiled(kernel, constants, matrices, tile.warps, tile.stages))
            print(
                f"{label:20} {layout:44} {row['registers']:9} {row['spilled']:8} {row['shared']:8} {row['wgmma']:6}",
                flush=True,
            )
        except Exception as error:
            row["error"] = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{label:20} {layout:44} {row['error']}", flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
