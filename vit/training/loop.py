"""Fine-tuning in one loop, to be read from top to bottom, copied and changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit.model import ViT

from .data import STEP, Images, Item, batches, loader, own_generators, seed_from
from .distributed import broadcast, precision, rank_and_world, summing, total, union, whole, wrap
from .evaluation import evaluate
from .loss import cross_entropy, mixup
from .recipes import Recipe, learning_rate, make_optimizer, prepare, set_rates
from .run import Folder
from .setup import check, check_data, default_transforms, not_finite, same_when_resumed, warn_of_unused_classes
from .state import State, restore, save, write_model


def train(
    model: nn.Module,
    data: Sequence[Any],
    recipe: Recipe,
    out: str | Path,
    *,
    validation: Sequence[Any] = (),
    augment: Callable[[Any], Tensor] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    class_weights: Tensor | None = None,
    device: str | torch.device = "cpu",
    strategy: str = "none",
    workers: int = 0,
    validate_every: int | None = None,
    save_every: int | None = None,
    max_bad: int = 0,
    facts: Mapping[str, Any] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> nn.Module:
    """Fine-tune a model. The same call goes on with a run that was interrupted, and ends with the same bits.

    Args:
        model: any module from images [B, C, H, W] to logits [B, classes], in float32. It is trained in place.
        data: the training images; `data[i]` is (image, label) or {"image": ..., "label": ...}, see `data.Images`.
        recipe: the numbers of the run.
        out: the run's folder; README.md lists the files.
        validation: the same for images that choose the best weights and are not trained on.
        augment: from an image to a tensor [C, H, W], in training; default, for a ViT: `data.RandomCrop`.
        transform: the same for validation; default, for a ViT: `vit.create_transform(model)`.
        class_weights: [classes], how much an image of each class counts, as from `data.balanced`.
        device: where the model is trained.
        strategy: "none", or over the processes that torchrun has started "ddp" or "fsdp", see `distributed.wrap`.
        workers: processes that prepare images; they change no result.
        validate_every: steps between validations; default: an epoch.
        save_every: steps between states; default: `validate_every`.
        max_bad: unreadable images that are left out before the run stops.
        facts: what else must be the same when the run is resumed, as plain data.
        log: called with each line of the log, in the first process.

    Returns:
        The trained model, or the average of its weights if the recipe has one, in eval mode.

    Raises:
        ValueError: arguments that do not fit each other; a run of another recipe in `out`; a label that the model has
            no class for; more unreadable images than `max_bad`; a loss that is not finite, with the step and its
            images. The last state stays on disk.
        OSError: a file cannot be written.
    """
    rank, world = rank_and_world()
    augment, transform = default_transforms(model, recipe, augment, transform)
    check_data(data, augment)
    check_data(validation, transform)
    check(model, recipe, len(data), world)
    if rank == 0:
        warn_of_unused_classes(model, data, validation)
    facts = same_when_resumed(model, recipe, data, validation, augment, transform, class_weights, facts)
    validate_every = validate_every or len(data) // recipe.batch_size
    device = torch.device(device)

    prepare(model, recipe)  # drop path, and what is trained
    model.to(device).train()
    broadcast(model.state_dict().values())
    average = copy.deepcopy(model).requires_grad_(False) if recipe.model_ema_decay else None
    result = model if average is None else average
    called = wrap(model, strategy, recipe.amp)
    judged = called if average is None else average if strategy != "fsdp" else wrap(average, strategy, recipe.amp)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16")
    context = precision(recipe.amp, device, strategy)
    state = State(model, optimizer, scaler, average)

    with Folder(Path(out), max_bad, log) as folder, own_generators(device):
        restore(folder.states, state, facts)
        folder.resume(state.step, recipe.steps)
        channels = model.config.in_chans if isinstance(model, ViT) else 3
        train_images = Images(data, augment, recipe.seed, channels)
        val_images = Images(validation, transform, recipe.seed, channels)
        keys = batches(len(data), recipe.batch_size, state.step, recipe.steps, recipe.seed, rank, world)
        for batch in loader(train_images, keys, workers, device):
            folder.report(union(batch.error, device))
            set_rates(optimizer, learning_rate(state.step, recipe.steps, recipe.warmup_steps))
            optimizer.zero_grad()
            loss = backward(called, batch, recipe, state.step, class_weights, scaler, context)
            norm = clip(model, optimizer, scaler, recipe.clip_grad)
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise ValueError(not_finite(loss, norm, state.step, train_images, recipe))
            scaler.step(optimizer)
            scaler.update()
            broadcast(model.buffers())  # BatchNorm's, which each process has counted by itself
            state.step += 1
            if average is not None:
                update_average(average, model, min(recipe.model_ema_decay, (1 + state.step) / (10 + state.step)))
            folder.log(
                step=state.step,
                loss=loss,
                norm=norm if math.isfinite(norm) else None,
                lr=optimizer.param_groups[-1]["lr"],
            )

            last = state.step == recipe.steps
            if len(validation) and (last or state.step % validate_every == 0):
                found, errors = evaluate(judged, val_images, recipe.batch_size, workers, context)
                folder.report(union(errors, device))
                folder.log(step=state.step, **found)
                if (goodness := (found["accuracy"], -found["val_loss"])) > state.best:
                    state.best = goodness
                    write_model(result, folder.path / "model_best.safetensors", recipe)
            if last or state.step % (save_every or validate_every) == 0:
                write_model(result, folder.path / "model.safetensors", recipe)
                save(folder.states, state, facts)
    return result.eval()


def backward(
    called: nn.Module,
    batch: Item,
    recipe: Recipe,
    step: int,
    class_weights: Tensor | None,
    scaler: torch.amp.GradScaler,
    context: Callable[[], AbstractContextManager],
) -> float:
    """Add the gradients of a step's images, computed in parts; returns the mean loss over all processes."""
    rank, world = rank_and_world()
    device = next(called.parameters()).device
    counts = batch.weight.float() if class_weights is None else batch.weight.float() * class_weights[batch.label]  # [B]
    total_count = total(counts.sum().to(device)).clamp(min=1e-12)
    loss = torch.zeros((), device=device)
    parts = [tensor.to(device, non_blocking=True).chunk(recipe.grad_accum_steps) for tensor in (*batch[:2], counts)]
    for i, (x, y, w) in enumerate(zip(*parts)):  # [b, C, H, W], [b], [b]
        torch.manual_seed(seed_from(recipe.seed, STEP, step, rank, i))  # for mixup, drop path and dropout
        x, targets = mixup(x, y, w, recipe.mixup)
        with summing(called, last=i + 1 == recipe.grad_accum_steps):
            with context():
                logits = called(x)  # [b, classes]
            losses = [(w * cross_entropy(logits, y, recipe.smoothing)).sum() for y, w in targets]
            part = torch.stack(losses).sum() / total_count
            scaler.scale(part * world).backward()  # PyTorch takes the mean of the processes' gradients; this is a sum
        loss += part.detach()
    return total(loss).item()


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, most: float) -> float:
    """Scale the gradient down to the norm `most` (0: leave it), and return the norm that it had."""
    scaler.unscale_(optimizer)
    return whole(nn.utils.clip_grad_norm_(model.parameters(), most or math.inf)).item()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model; other tensors, such as BatchNorm's, are copied."""
    for mean, parameter in zip(average.parameters(), model.parameters()):
        mean.lerp_(parameter, 1 - decay)
    for copied, buffer in zip(average.buffers(), model.buffers()):
        copied.copy_(buffer)
