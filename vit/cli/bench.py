"""`vit bench`: how fast a model is here, over batch sizes, image sizes, dtypes, attention functions and threads."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vit.checks import whole_patches
from vit.exporting import ExportedModel
from vit.exporting.foreign import ForeignModel
from vit.model import ViT
from vit.presets import create_model, list_models
from vit.registry import get_attention

from . import loading, options, plots, runtime, timing
from .loading import Model
from .timing import Case

MODEL = "vit_small_patch16_224"
TABLE = (
    "image size  batch  optimized dtype     attention  threads   ms/batch   quartiles           images/s   GFLOP/s"
    "  of peak   peak MiB"
)


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory on this machine",
        description="Time forward passes on this machine. Lists are separated by commas; all combinations run, in "
        "turns, so that other load on the machine hits all alike. Peak MiB is the memory that a call takes beyond the "
        "model and its images.",
    )
    parser.add_argument(
        "--model", default=MODEL, metavar="NAME_OR_PATH",
        help="an architecture, which gets random weights, or a checkpoint as for vit predict; default: %(default)s",
    )  # fmt: skip
    loading.add_trust(parser)
    options.add_reading(parser)
    parser.add_argument("--device", type=options.device, default="cpu", help="cpu, cuda ... default: %(default)s")
    threads = torch.get_num_threads()
    for flags, one, default, text in (
        (("-b", "--batch-size"), options.positive, [1, 8], "images per call; default: 1,8"),
        (("--img-size",), options.fixed_size, [None], "224,384x160 (height x width); default: the model's"),
        (("--dtype",), options.one_of(*options.DTYPES), ["float32"], "float32,bfloat16,float16; default: float32"),
        (("--attention",), str, None, "registered names; default: sdpa, or what --optimize chooses"),
        (("--threads",), processors, [threads], f"default: {threads}"),
        (("--optimize",), optimization, [None], "none,float32,int8 on a CPU; none,bfloat16,float16 on an NVIDIA GPU"),
    ):
        parser.add_argument(*flags, type=options.listed(one), default=default, metavar="LIST", help=text)
    runtime.add_runtime(parser, "logits", "--img-size")
    parser.add_argument(
        "--rounds", type=options.positive, default=10, help="how often each combination runs; default: %(default)s"
    )
    parser.add_argument("--profile", action="store_true", help="show where the time goes, per kind of operation")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and case")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw images per second against batch size: .png, .svg or .pdf"
    )
    parser.set_defaults(run=run)


def processors(text: str) -> int:
    """A number of threads, for argparse: at most one per processor."""
    threads, most = options.positive(text), os.cpu_count() or 1
    if threads > most:
        raise argparse.ArgumentTypeError(f"expected at most {most}, the number of processors here, got {text!r}")
    return threads


def optimization(text: str) -> str | None:
    """The dtype to optimize to, for argparse; None for "none"."""
    name = options.one_of("none", *loading.OPTIMIZE)(text)
    return None if name == "none" else name


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    """Load, race, print a row per case."""
    if args.plot is not None:
        plots.check(args.plot)
    for name in args.attention or ():
        get_attention(name)  # which refuses unknown names
    models, threads = load(args), torch.get_num_threads()
    try:
        rows, refused = measure(args, models)
    finally:
        torch.set_num_threads(threads)
    show(args, models, rows + [vars(case) | {"refused": why} for case, why in refused.items()])
    if not rows:
        raise ValueError("none of these cases can run here")
    if args.plot is not None:
        plots.save(plots.speed(rows), args.plot)
    return 0


def measure(
    args: argparse.Namespace, models: Mapping[str | None, Model | str]
) -> tuple[list[dict[str, Any]], dict[Case, str]]:
    """The rows of the table, and why the other cases cannot run here. Leaves the number of threads changed.

    In one race with optimized models, the model as it is also profits from the memory that the process keeps for them.
    """
    bar = partial(tqdm, leave=False, disable=True if args.json else None)
    calls, refused = prepare(models, cases(args, models), args.device, bar)
    peaks = {
        (kind, threads): timing.peak_flops(kind, threads, args.device)
        for kind, threads in dict.fromkeys((case.dtype, case.threads) for case in calls)
    }
    times = timing.race(calls, args.rounds, args.device, partial(bar, unit="call")) if calls else {}
    rows = []
    for case, call in calls.items():
        torch.set_num_threads(case.threads)
        rows.append(describe(case, times[case], call, peaks, args.device))
        if args.profile:
            rows[-1]["profile"] = timing.profile_kinds(call, args.device)
    return rows, refused


def load(args: argparse.Namespace) -> dict[str | None, Model | str]:
    """{dtype it is optimized to, or None: the model}; with random weights if --model names an architecture.

    If there are several dtypes and one cannot run here, it gets the reason instead of a model.
    """
    if args.runtime or runtime.is_ours(args.model):
        return {None: load_exported_file(args)}
    file = loading.is_optimized_file(args.model)
    wanted = [name for name in args.optimize if name is not None]
    if args.dtype != ["float32"] and (file or None not in args.optimize):
        other = next(name for name in args.dtype if name != "float32")
        raise ValueError(f"an optimized model takes images in float32, so --dtype {other} cannot go with it")
    one = argparse.Namespace(**vars(args) | {"dtype": "float32", "optimize": None})
    for name in wanted:
        loading.check(one, name)  # before a large file is read
    if file:
        if wanted:
            raise ValueError(f"{args.model} is optimized already, so --optimize cannot go with it")
        model = loading.load_vit(one)
        return {loading.optimized(model): model}
    if args.model in list_models() and args.model not in list_models(pretrained=True):
        if any(value not in (None, []) for value in (args.layout, args.prefix, args.sha256)):
            raise ValueError(f"{args.model} gets random weights: --layout, --prefix and --sha256 are for checkpoints")
        model = create_model(args.model, **dict(args.settings)).eval().to(args.device)
    else:
        model = loading.load_vit(one)
    return {name: model if name is None else optimized(model, name, len(args.optimize) > 1) for name in args.optimize}


def load_exported_file(args: argparse.Namespace) -> Model:
    """An exported file; ValueError for options that are for checkpoints."""
    given = {"dtype": "float32" if args.dtype == ["float32"] else args.dtype, "optimize": args.optimize != [None]}
    if args.profile:
        raise ValueError(f"{args.model} is an exported file, whose runtime --profile does not see into")
    return loading.load(argparse.Namespace(**vars(args) | given))


def optimized(model: ViT, dtype: str, others: bool) -> ViT | str:
    """`vit.kernels.optimize`; if there are other models to race, an error is returned as its text."""
    from vit import kernels

    try:
        return kernels.optimize(model, dtype)
    except ValueError as error:
        if not others:
            raise
        return str(error)


def cases(args: argparse.Namespace, models: Mapping[str | None, Model | str]) -> list[Case]:
    """All combinations; an optimized model has its own dtype."""
    own = next((model.preprocessing.size for model in models.values() if not isinstance(model, str)), (0, 0))
    return [
        Case(size or own, batch, optimize, dtype, attention, threads)
        for size, batch in itertools.product(args.img_size, args.batch_size)
        for optimize, model in models.items()
        for dtype in ([optimize] if optimize else args.dtype)
        for attention in args.attention or [attention_of(model)]
        for threads in args.threads
    ]


def attention_of(model: Model | str) -> str:
    """The names of a model's attention functions, joined by +."""
    names = [attend.name or "own" for attend in model.attends] if isinstance(model, ViT) else ["-"]
    return "+".join(dict.fromkeys(names))


def prepare(
    models: Mapping[str | None, Model | str],
    cases: list[Case],
    device: torch.device,
    bar: Callable[..., Iterable[Case]],
) -> tuple[dict[Case, partial[Tensor]], dict[Case, str]]:
    """What to call for each case, and why the others cannot run here; each is tried once."""
    made: dict[tuple[Any, ...], Model] = {}
    calls: dict[Case, partial[Tensor]] = {}
    refused: dict[Case, str] = {}
    for case in bar(cases, "first calls"):
        source = models[case.optimize]
        key = case.optimize, case.dtype, case.attention, isinstance(source, ExportedModel) and case.threads
        if isinstance(source, str):
            refused[case] = source
            continue
        model = made[key] = made.get(key) or variant(source, case)
        whole_patches(case.size, model.config.patch_size)
        dtype = torch.float32 if case.optimize else options.DTYPES[case.dtype]  # of the images
        if isinstance(model, ExportedModel):
            dtype = model.dtype
        try:
            calls[case] = partial(model, timing.images(case, model.config, device, dtype))
            calls[case]()
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not timing.is_out_of_memory(error):
                raise
            calls.pop(case, None)
            refused[case] = str(error) if isinstance(error, ValueError) else "not enough memory"
    return calls, refused


def variant(model: Model, case: Case) -> Model:
    """A copy of a model with a case's dtype and attention; of an exported one, with its number of threads."""
    if isinstance(model, ExportedModel):
        return model.with_threads(case.threads)
    copied = copy.deepcopy(model)
    if case.optimize is None:
        copied.to(options.DTYPES[case.dtype])
    if case.attention != attention_of(model):
        copied.set_attention(case.attention)
    return copied


def describe(
    case: Case, times: list[float], call: partial[Tensor], peaks: dict, device: torch.device
) -> dict[str, Any]:
    """One row of the table."""
    model: Any = call.func
    low, median, high = timing.spread(times)
    read = model.tokens_read() if case.optimize else None
    size = model.preprocessing.size if getattr(model, "input", None) == "image" else case.size
    known = not isinstance(model, ForeignModel)
    speed = timing.flops(model.config, size, read) * case.batch / median if known else None
    peak = peaks[case.dtype, case.threads]
    return vars(case) | {
        "ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high,
        "images_per_s": case.batch / median, "gflops": speed and speed / 1e9,
        "share_of_peak": speed and speed / peak, "peak_gflops": peak / 1e9,
        "peak_mib": None if isinstance(model, ExportedModel) else timing.peak_memory(call, device),
        "rounds": len(times),
    }  # fmt: skip


def show(args: argparse.Namespace, models: Mapping[str | None, Model | str], rows: list[dict[str, Any]]) -> None:
    """Print the table, or JSON lines."""
    where = timing.environment(args.device)
    if args.json:
        for row in rows:
            print(json.dumps({"model": args.model} | row | {"environment": where}))
        return
    weights = next((weights_of(model) for model in models.values() if not isinstance(model, str)), "random weights")
    print(f"{args.model} ({weights}) on {where['processor']}, torch {where['torch']}")
    print(TABLE)
    for row in rows:
        print(line(row))
        for kind, share in row.get("profile", {}).items():
            print(f"    {kind:18} {share:6.1%}")
    timed = [row for row in rows if "peak_gflops" in row]
    peaks = {(row["dtype"], row["threads"]): row["peak_gflops"] for row in timed}
    for (kind, threads), peak in peaks.items():
        product = f"product of at most {timing.PEAK_SIDE.get(args.device.type, 4096)}^3"
        print(f"peak: {peak:.0f} GFLOP/s, a {product} in {kind} with {threads} thread{'s' * (threads > 1)}")


def weights_of(model: Model) -> str:
    """Where a model's weights came from; of an exported file, its runtime."""
    if isinstance(model, ExportedModel):
        return model.session.name
    return model.provenance.source if model.provenance else "random weights"


def number(value: float | None, form: str) -> str:
    """A number in a format, or -."""
    return "-" if value is None else format(value, form)


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    height, width = row["size"]
    which = f"{'yes' if row['optimize'] else 'no':9} {row['dtype']:9} {row['attention']:10} {row['threads']:6}"
    what = f"{f'{height}x{width}':11} {row['batch']:5}  {which}"
    if "refused" in row:
        return f"{what}   refused: {row['refused']}"
    quartiles = f"{row['low']:.1f} to {row['high']:.1f}"
    return (
        f"{what} {row['ms']:11.1f}   {quartiles:18} {row['images_per_s']:9.1f} {number(row['gflops'], '.0f'):>9} "
        f"{number(row['share_of_peak'], '.0%'):>8} {number(row['peak_mib'], '.0f'):>10}"
    )
