"""The state of a run on disk: complete or not there, and refused if it is another run's."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vit
from vit.files import replacing, write_json
from vit.metadata import Provenance
from vit.model import ViT

from .distributed import barrier, rank_and_world, whole
from .recipes import Recipe


@dataclass
class State:
    """All that a run changes, besides the files that it has written."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module | None = None
    step: int = 0  # updates done
    best: tuple[float, float] = (-1.0, 0.0)  # accuracy on the validation images, and minus the loss on them

    def tensors(self) -> dict[str, Any]:
        """What `torch.distributed.checkpoint` writes and reads in place; rates follow from the recipe and the step."""
        parts = {"model": self.model.state_dict(), "optimizer": self.moments()}
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        return parts

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's tensors by the names of their parameters, which may be without any."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[parameter]: dict(values) for parameter, values in self.optimizer.state.items()}

    def make_room(self, shapes: Mapping[str, Any]) -> None:
        """Zeros for the moments that a saved state has; `shapes` are its tensors' by their names there."""
        for name, parameter in self.model.named_parameters():
            start = f"optimizer.{name}."
            for key in [key for key in shapes if key.startswith(start) and "." not in key.removeprefix(start)]:
                own = shapes[key].size == parameter.shape
                zeros = torch.zeros_like(parameter) if own else torch.zeros(shapes[key].size)  # AdamW counts steps
                self.optimizer.state[parameter][key.removeprefix(start)] = zeros


def save(folder: Path, state: State, facts: Mapping[str, Any]) -> None:
    """Write the state to `folder`/step-N, which gets its name when it is complete; then older ones are removed.

    All processes must call it.

    Args:
        folder: where the run keeps its states.
        state: what to write.
        facts: what must be the same when the run is resumed, as plain data.

    Raises:
        OSError: it cannot be written, as on a full disk. The older state is then still there.
    """
    import torch.distributed.checkpoint as dcp  # here and below, since it takes a second
    from torch.distributed.checkpoint import CheckpointException

    done = folder / f"step-{state.step:07}"
    part = done.with_suffix(".part")
    rank, world = rank_and_world()
    if rank == 0:
        for left in folder.glob("*.part"):  # of a run that was killed
            shutil.rmtree(left)
        part.mkdir(parents=True)
    barrier()
    try:
        with _quiet():
            dcp.save(state.tensors(), checkpoint_id=part, no_dist=world == 1)
        if rank == 0:
            scaler = state.scaler.state_dict()
            write_json(part / "run.json", {"step": state.step, "best": state.best, "scaler": scaler, "facts": facts})
            with (part / "run.json").open("rb") as file:
                os.fsync(file.fileno())  # as PyTorch does with the others, before the older state is removed
    except (Exception, CheckpointException) as error:  # PyTorch wraps the system's error
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            errno.EIO, f"the state of step {state.step} cannot be saved ({_reason(error)})", str(done)
        ) from error
    if rank == 0:
        os.replace(part, done)
        for old in folder.glob("step-*"):
            if old != done:
                shutil.rmtree(old)
    barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """The system's own words if a file could not be written or read; PyTorch keeps errors by process."""
    for failure, _ in getattr(error, "failures", {}).values():
        error = failure
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    system = [one.strerror for one in chain if isinstance(one, OSError) and one.strerror]
    return system[0] if system else str(error).splitlines()[0]


def restore(folder: Path, state: State, facts: Mapping[str, Any]) -> None:
    """Read the newest complete state into `state`; leave it as it is if there is none.

    The number of processes and their strategy may differ from those that wrote it.

    Raises:
        ValueError: the state is of a run with other facts; the error names them.
    """
    found = sorted(path for path in folder.glob("step-*") if path.suffix != ".part")
    if not found:
        return
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import CheckpointException

    from .trusted import Reader

    try:
        run = json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))
        check_same(folder.parent, run["facts"], facts)
        reader = Reader(found[-1])
        state.make_room(reader.read_metadata().state_dict_metadata)
        with _quiet():
            dcp.load(state.tensors(), storage_reader=reader, no_dist=rank_and_world()[1] == 1)
        state.scaler.load_state_dict(run["scaler"])
        state.step, state.best = run["step"], tuple(run["best"])
    except AnotherRun:
        raise
    except (Exception, CheckpointException) as error:  # PyTorch wraps the reason
        raise ValueError(f"cannot read {found[-1]}: {_reason(error)}; remove it to begin anew") from error


class AnotherRun(ValueError):
    """The folder holds a run that differs from this one."""


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError that names each fact of a run that differs from those of the run in `folder`."""
    now = json.loads(json.dumps(now))  # as it was written: tuples are lists
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(change(name, before.get(name), now.get(name)) for name in names)
        best, last = folder / "model_best.safetensors", folder / "model.safetensors"
        weights = best if best.exists() else last
        longer = f"; to train its weights for more steps: --model {weights} -o ANOTHER" * ("steps" in names)
        raise AnotherRun(
            f"{folder} holds another run ({changes}): repeat the command that began it, or choose another folder"
            + longer
        )


def change(name: str, before: Any, now: Any, most: int = 60) -> str:
    """How a fact differs, in words that fit on a line."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        shown = ", ".join(change(key, before.get(key, 0), now.get(key, 0)) for key in keys[:3])
        return f"{name}: {shown}" + f" and {len(keys) - 3} more" * (len(keys) > 3)
    if any(len(repr(value)) > most for value in (before, now)):  # a hash, or a list of all labels
        return f"other {name}"
    return f"{name} {before!r}, now {now!r}"


def write_model(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Write a model's weights: a ViT's as `vit.save_checkpoint` does, another module's as a plain state dict."""
    if isinstance(model, ViT):
        origin = model.provenance or Provenance("random weights", "", "vit")
        before, model.provenance = model.provenance, replace(origin, recipe=json.dumps(asdict(recipe)))
        try:
            vit.save_checkpoint(model, path)
        finally:
            model.provenance = before
        return
    tensors = {name: whole(tensor).clone().contiguous() for name, tensor in model.state_dict().items()}
    if rank_and_world()[0] == 0:
        with replacing(path) as temporary:
            save_file(tensors, temporary)
