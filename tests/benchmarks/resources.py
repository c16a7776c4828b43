"""The registers and shared memory that the GPU kernels take, as compiled for Hopper: no GPU is needed.

    python tests/benchmarks/resources.py [--width 384] [--json out.json]

For each use of a kernel and each layout in `vit.kernels.gpu.tiles`: registers of a thread (255 at most), bytes a thread
spills out of them, shared memory of a program (227 KiB at most), how many programs fit a multiprocessor by these two,
how many of Hopper's own products (wgmma) are in the code, and the seconds to compile it, of which the first call of a
model on a GPU takes as many as it has layouts to measure.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vit.kernels.attention import flash_kernels
from vit.kernels.attention.flash import OPTIONS
from vit.kernels.gpu import triton_kernels
from vit.kernels.gpu.tiles import TILES, Tile

POINTERS = {
    **dict.fromkeys(("bias", "sums", "bias1", "sums1", "bias2", "lse", "delta", "positions"), "*fp32"),
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), "*bf16"),
}  # fmt: skip


Use = tuple[dict[str, Any], dict[str, list[int]], dict[str, str]]  # constants, tiles of matrices, other pointers


def uses(kernel: str, width: int, tile: Tile) -> dict[str, Use]:
    """What a kernel is compiled for in a ViT of this width: constants, and the tiles of its matrices."""
    R, C, E = tile.R, tile.C, tile.E
    if kernel == "linear":
        norm, add = {"GELU": "", "residual": None}, {"GELU": "", "sums": None}
        values = {
            "qkv": {"N": 3 * width, "K": width, **norm}, "proj": {"N": width, "K": width, **add},
            "fc1": {"N": 4 * width, "K": width, **norm, "GELU": "erf"}, "fc2": {"N": width, "K": 4 * width, **add},
        }  # fmt: skip
        matrices = {"x": [R, E], "weight": [C, E], "out": [R, C]}
        return {
            use: ({"R": R, "C": C, "E": E, **known}, matrices | ({"residual": [R, C]} if "sums" in known else {}), {})
            for use, known in values.items()
        }
    if kernel == "mlp":
        E, known = width // 3, {"H": 4 * width, "D": width, "GELU": "erf", "RESIDUAL": True}
        matrices = {"x": [R, E], "weight1": [C, E], "weight2": [E, C], "out": [R, E]}
        return {"mlp": ({"R": R, "C": C, **known}, matrices, {})}
    known = {"R": R, "C": C, "E": E, "p": 16, "K": 768, "D": width}
    return {
        "patches of bytes": ({**known, "BYTES": True}, {"weight": [C, E]}, {"images": "*u8"}),
        "patches of floats": ({**known, "BYTES": False}, {"weight": [C, E]}, {"images": "*fp32"}),
    }


def compiled(kernel: Any, use: Use, warps: int, stages: int) -> Any:
    """The machine code for compute capability 9.0 and bfloat16, with rows on multiples of 16 bytes."""
    constants, matrices, others = use
    pointers = POINTERS | others
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
            signature[name] = pointers.get(name, "fp32" if name in ("eps", "scale") else "i32")
            if name in pointers or name.endswith("stride"):
                attributes[i,] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages, **OPTIONS}
    return triton.compile(ASTSource(kernel, signature, values, attributes), GPUTarget("cuda", 90, 32), options)


def resources(code: Any, warps: int) -> dict[str, Any]:
    """What the compiler reports. A multiprocessor has 65,536 registers and 227 KiB; 1 KiB goes to each program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    shared = code.metadata.shared
    fits = min(65536 // (32 * warps * found["REG"]), 227 * 1024 // (shared + 1024))
    return {
        "fits": fits, "registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": shared,
        "scratch": code.metadata.global_scratch_size, "wgmma": len(re.findall(r"wgmma\.mma_async", code.asm["ptx"])),
    }  # fmt: skip


def cases(width: int) -> list[tuple[str, Any, Use, Any]]:
    """Label, kernel, use and layout: attention, and every layout of the others."""
    found: list[tuple[str, Any, Use, Any]] = []
    for label, backward in (("forward", False), ("key_value", True), ("query", True)):
        tile = flash_kernels.launch(64, flash_kernels.torch.bfloat16, backward=backward)
        constants = {"d": 64, "E": 64, "R": tile.R, "C": tile.C, "bias": None, "bias_t": None}
        found.append((f"attention, {label}", getattr(flash_kernels, f"{label}_kernel"), (constants, {}, {}), tile))
    for (name, few), tiles in TILES.items():
        kernel = getattr(triton_kernels, f"{name}_kernel")
        for tile in tiles:
            parts = uses(name, width, tile).items()
            found += [(f"{label}, few rows" if few else label, kernel, use, tile) for label, use in parts]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="D, the tokens' width")
    parser.add_argument("--json", type=Path, help="write the table here too")
    args = parser.parse_args()
    rows = []
    names = f"{'fits':>4} {'registers':>9} {'spilled':>8} {'shared':>8} {'wgmma':>6} {'seconds':>7}"
    print(f"{'kernel':28} {'layout':44} {names}")
    for label, kernel, use, tile in cases(args.width):
        layout = ", ".join(f"{key} {value}" for key, value in tile._asdict().items())
        row = {"kernel": label, "layout": tile._asdict()}
        try:
            start = time.perf_counter()
            code = compiled(kernel, use, tile.warps, tile.stages)
            row |= {"seconds": time.perf_counter() - start} | resources(code, tile.warps)
            columns = f"{row['fits']:4} {row['registers']:9} {row['spilled']:8} {row['shared']:8} {row['wgmma']:6}"
            columns += f" {row['seconds']:7.1f}"
            print(f"{label:28} {layout:44} {columns}", flush=True)
        except Exception as error:
            row["error"] = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{label:28} {layout:44} {row['error']}", flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
