"""Training: a step beside timm's and transformers', the loop, the loader, saving a state, and two processes.

    python tests/benchmarks/training.py [--stages step memory loop loader state processes] [--json out.json]

Eager float32 ViT-S/16 at 224 px on one thread, unless the options say otherwise. `again` is the same thing timed once
more: how far its ratio lies from that of its twin is the noise of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from harness import environment, interleave, print_rows, summarize, write_json
from helpers import FLOAT32, GRADIENT, difference, images, ours_from, timm_twin
from peers import build_peer

import vit
from vit.presets import NAMED_MODELS
from vit.training import Images, RandomCrop, Recipe, State, restore, save, train
from vit.training.data import batches, loader
from vit.training.recipes import make_optimizer

CONTESTANTS = ("timm", "ours", "transformers")
CLASSES = 1000


class Contestant:
    """A model and its optimizer. Calling it is one training step on the same images.

    Args:
        name: one of `CONTESTANTS`; all have the same weights.
        args: the depth of the model and the size of images.
        batch: images per step.
        checkpointing: compute the blocks again in the backward pass.
    """

    def __init__(self, name: str, args: argparse.Namespace, batch: int, checkpointing: bool) -> None:
        config = config_of(args)
        twin = timm_twin(config)
        self.model: nn.Module = twin
        self.forward: Callable[[Tensor], Tensor] = twin
        if name == "ours":
            self.model = self.forward = ours_from(twin, config.override(grad_checkpointing=checkpointing))
        elif name == "transformers":
            state = vit.weights.convert(twin.state_dict(), "timm", "transformers", config).state_dict
            self.forward = build_peer("transformers", state, config)
            self.model = self.forward.args[0]  # type: ignore[attr-defined]
            if checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        elif checkpointing:
            twin.set_grad_checkpointing(True)  # type: ignore[operator]
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.x, self.y = images(batch, 3, args.img_size, args.img_size), torch.arange(batch) % CLASSES

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.forward(self.x), self.y).backward()
        self.optimizer.step()


def config_of(args: argparse.Namespace) -> vit.ViTConfig:
    """ViT-S/16 for the images' size."""
    return NAMED_MODELS["vit_small_patch16_224"].config.override(
        img_size=args.img_size, depth=args.depth, num_classes=CLASSES
    )


def check_equal(contestants: dict[str, Contestant]) -> None:
    """All compute the same logits, and timm's model and ours the same gradient at the far end."""
    logits = {name: one.forward(one.x) for name, one in contestants.items()}
    assert all(difference(found, logits["timm"]) <= FLOAT32 for found in logits.values())
    for one in contestants.values():
        cross_entropy(one.forward(one.x), one.y).backward()
    ours, timm = (contestants[name].model.patch_embed.proj.weight.grad for name in ("ours", "timm"))  # type: ignore[union-attr]
    assert difference(ours, timm) <= GRADIENT  # type: ignore[arg-type]


def step(args: argparse.Namespace) -> list[dict]:
    """A training step with AdamW at each batch size, with and without checkpointing."""
    results = []
    for batch in args.batch:
        for checkpointing in (False, True):
            contestants = {name: Contestant(name, args, batch, checkpointing) for name in CONTESTANTS}
            check_equal(contestants)
            calls: dict[str, Callable] = contestants | {"ours, again": contestants["ours"]}
            rows = summarize(interleave(calls, args.rounds, f"batch {batch}"), "timm")
            title = f"a step, batch {batch}{', checkpointing' * checkpointing}"
            print_rows(f"{title}, {args.img_size} px, {args.threads} thread(s)", rows, "timm")
            results.append({"batch": batch, "checkpointing": checkpointing, "rows": rows})
    return results


def memory(args: argparse.Namespace) -> list[dict]:
    """What steps take, each contestant in processes of its own.

    "process" is all that it takes beyond the model and its images, AdamW's moments too; "tensors" is what PyTorch
    holds at most in a later step, activations and gradients.
    """
    results: list[dict] = []
    print("\npeak memory, MiB: of the process, beyond model and images; of activations and gradients")
    for batch in args.batch:
        for checkpointing in (False, True):
            row: dict[str, Any] = {"batch": batch, "checkpointing": checkpointing}
            for name in CONTESTANTS:
                found = [child(args, role="memory", name=name, batch=batch, checkpointing=checkpointing)
                         for _ in range(args.processes)]  # fmt: skip
                row[name] = {key: statistics.median(one[key] for one in found) for key in found[0]}
            cells = ", ".join(f"{name} {row[name]['process']:.0f} {row[name]['tensors']:.0f}" for name in CONTESTANTS)
            print(f"  batch {batch}{', checkpointing' * checkpointing}: {cells}", flush=True)
            results.append(row)
    return results


def child_memory(args: argparse.Namespace, name: str, batch: int, checkpointing: bool) -> dict[str, float]:
    """In a process of its own: the peaks in MiB."""
    from vit.cli.timing import peak_memory

    def of_process(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    contestant = Contestant(name, args, batch, checkpointing)
    before = of_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        contestant()
    process = of_process("VmHWM") - before
    contestant.optimizer.zero_grad()
    return {"process": process, "tensors": peak_memory(contestant, torch.device("cpu"))}


def loop(args: argparse.Namespace) -> list[dict]:
    """`train` with images in memory, and the same steps written bare."""
    batch = args.batch[0]
    recipe = Recipe(batch_size=batch, steps=args.steps + 1, warmup_steps=0, lr=1e-6)
    model = ours_from(timm_twin(config_of(args)), config_of(args))
    data = in_memory(args, 4 * batch)
    calls = {"bare": bare_steps, "train": train_steps, "bare, again": bare_steps}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name in [*calls, *reversed(calls)]:
            seconds[name] += calls[name](model, data, recipe)
    rows = summarize(seconds, "bare")
    print_rows(f"the loop, batch {batch}, {args.img_size} px, {args.threads} thread(s)", rows, "bare")
    return rows


def in_memory(args: argparse.Namespace, count: int) -> list[tuple[Tensor, int]]:
    return [(one, i % CLASSES) for i, one in enumerate(images(count, 3, args.img_size, args.img_size))]


def train_steps(
    model: nn.Module, data: list[tuple[Tensor, int]], recipe: Recipe, strategy: str = "none"
) -> list[float]:
    """Seconds from one step's end to the next one's, so without the first step, and without the state that follows."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            model, data, recipe, folder, augment=lambda x: x, transform=lambda x: x, strategy=strategy,
            save_every=recipe.steps, log=lambda _: ends.append(time.perf_counter()),
        )  # fmt: skip
    return [after - before for before, after in pairwise(ends)]


def bare_steps(model: nn.Module, data: list[tuple[Tensor, int]], recipe: Recipe) -> list[float]:
    """Seconds per step; the first is not counted."""
    model.train()
    optimizer = make_optimizer(model, recipe)
    ends = []
    for i in range(recipe.steps):
        part = [data[j % len(data)] for j in range(i * recipe.batch_size, (i + 1) * recipe.batch_size)]
        x, y = torch.stack([image for image, _ in part]), torch.tensor([label for _, label in part])
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y, label_smoothing=recipe.smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        loss.item()
        ends.append(time.perf_counter())
    return [after - before for before, after in pairwise(ends)]


def load_images(args: argparse.Namespace) -> list[dict]:
    """Photographs decoded, cropped at random and resized, in this process (0 workers) and in workers."""
    results = []
    print(f"\nthe loader: JPEG files of 500 x 375, random crops to {args.img_size} px, images per second")
    with tempfile.TemporaryDirectory() as folder:
        files = [(path, 0) for path in photographs(Path(folder), args.images)]
        model = vit.create_model("vit_small_patch16_224", depth=1, img_size=args.img_size)
        crops = Images(files, RandomCrop(vit.create_transform(model, mode="squash"), Recipe.scale, Recipe.hflip), 0)
        count = max(args.images // 16, 2)
        for workers in args.workers:
            rates = []
            for _ in range(args.rounds):
                found = iter(loader(crops, batches(len(files), 16, 0, count, 0), workers, torch.device("cpu")))
                next(found)  # the workers have started
                start = time.perf_counter()
                rest = sum(len(batch.label) for batch in found)
                rates.append(rest / (time.perf_counter() - start))
            rate = statistics.median(rates)
            print(f"  {workers} workers: {rate:.1f}, {rate / max(workers, 1):.1f} for each", flush=True)
            results.append({"workers": workers, "images_per_second": rate, "all": rates})
    return results


def photographs(folder: Path, count: int) -> Iterator[Path]:
    """Parts of scikit-image's photographs as JPEG files."""
    from PIL import Image
    from skimage import data

    photos = [Image.fromarray(photo) for photo in (data.astronaut(), data.chelsea(), data.coffee())]
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        width = 240 + int(torch.randint(0, 160, (1,), generator=generator))
        left = int(torch.randint(0, photo.width - width + 1, (1,), generator=generator))
        top = int(torch.randint(0, photo.height - width * 3 // 4 + 1, (1,), generator=generator))
        part = photo.resize((500, 375), box=(left, top, left + width, top + width * 3 // 4))
        part.save(folder / f"{i:05}.jpg", quality=90)
        yield folder / f"{i:05}.jpg"


def state(args: argparse.Namespace) -> list[dict]:
    """A state saved and read: weights, AdamW's moments, the weights' average; and the same bytes in a plain file."""
    model = vit.create_model("vit_small_patch16_224", depth=args.depth)
    average = vit.create_model("vit_small_patch16_224", depth=args.depth)
    optimizer = make_optimizer(model, Recipe())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    whole = State(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), average)
    moments = [one for group in whole.tensors()["optimizer"].values() for one in group.values()]
    tensors = [*model.parameters(), *average.parameters(), *(one for one in moments if isinstance(one, Tensor))]
    size = sum(one.numel() * one.element_size() for one in tensors)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def plain() -> None:
            with (folder / "plain").open("wb") as file:
                for one in tensors:
                    one.detach().numpy().tofile(file)
                os.fsync(file.fileno())

        def keep() -> None:
            whole.step += 1  # a folder of another name, as in a run
            save(folder / "state", whole, {})

        calls = {"plain file": plain, "save": keep, "save, again": keep,
                 "restore": lambda: restore(folder / "state", whole, {})}  # fmt: skip
        rows = summarize(interleave(calls, args.rounds), "plain file")
    print_rows(f"a state of {size / 1e6:.0f} MB", rows, "plain file")
    return [{"bytes": size, "rows": rows}]


def processes(args: argparse.Namespace) -> list[dict]:
    """`train` on one batch size in one process of one and of two threads, and in two processes of one thread (DDP)."""
    batch = args.batch[-1]
    calls = {"one process": (1, "none", 1), "two processes": (2, "ddp", 1), "two threads": (1, "none", 2)}
    calls["one process, again"] = calls["one process"]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.processes):
        for name in [*calls, *reversed(calls)]:
            count, strategy, threads = calls[name]
            options = {"role": "steps", "strategy": strategy, "batch": batch}
            seconds[name] += child(args, count=count, threads=threads, **options)["seconds"]
    rows = summarize(seconds, "one process")
    print_rows(f"a step of `train` over all processes, batch {batch}, {args.img_size} px", rows, "one process")
    return rows


def child_steps(args: argparse.Namespace, strategy: str, batch: int) -> dict[str, list[float]]:
    """In the processes of torchrun, or in one alone: seconds per step."""
    recipe = Recipe(batch_size=batch, steps=args.steps + 1, warmup_steps=0, lr=1e-6)
    model = ours_from(timm_twin(config_of(args)), config_of(args))
    if strategy != "none":
        torch.distributed.init_process_group("gloo")
    seconds = train_steps(model, in_memory(args, 4 * batch), recipe, strategy)
    if strategy != "none":
        torch.distributed.destroy_process_group()
    return {"seconds": seconds}


def child(args: argparse.Namespace, count: int = 1, threads: int | None = None, **options: Any) -> dict[str, Any]:
    """This program in `count` processes of its own; what the first prints last, as JSON."""
    sizes = {"img_size": args.img_size, "depth": args.depth, "steps": args.steps, "threads": threads or args.threads}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, __file__, "--child", json.dumps({"sizes": sizes, **options})]
    env = os.environ | {"OMP_NUM_THREADS": str(sizes["threads"])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(text: str) -> None:
    """Do what `child` has asked for."""
    options = json.loads(text)
    args = argparse.Namespace(**options.pop("sizes"))
    torch.set_num_threads(args.threads)
    found = {"memory": child_memory, "steps": child_steps}[options.pop("role")](args, **options)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)
    os._exit(0)  # as vit/__main__.py does, which says why


STAGES: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "step": step, "memory": memory, "loop": loop, "loader": load_images, "state": state, "processes": processes,
}  # fmt: skip


def main() -> None:
    """Run the stages, print tables, write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=6, help="each contestant runs twice as often")
    parser.add_argument("--processes", type=int, default=3, help="runs of each contestant that has its own processes")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run of the loop")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8], help="the loop takes the first, DDP the last")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--images", type=int, default=512, help="files for the loader")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
        return
    torch.set_num_threads(args.threads)
    import timm
    import transformers

    versions = {"timm": timm.__version__, "transformers": transformers.__version__}
    results: dict[str, Any] = {"environment": environment() | versions}
    print(results["environment"])
    for name in args.stages:
        results[name] = STAGES[name](args)
        write_json(args.json, results)


if __name__ == "__main__":
    main()
