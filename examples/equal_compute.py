"""ViT-S, ResNet-50 and EfficientNet-B0, each trained for the same measured seconds.

    python examples/equal_compute.py -o equal_compute.png

Takes 2 minutes on one core. Each model first takes eleven steps on a copy; the last ten are timed and tell how many
steps fill the seconds, and `vit.training.train` does them under one recipe. On a CPU the seconds are the processor's,
all threads together, since other programs may be at work. Beside the measured seconds stand the multiply-adds of a
forward pass and, three times as many for each image (forward, and twice that backward), those of the training. Only the
forward pass is counted: for the backward pass of depthwise convolutions PyTorch's FlopCounterMode counts as if they had
one group, and finds 40 forward passes in a step of EfficientNet, not 3. From random weights, on the 360 held-out digits
at 32x32, it draws the losses and the accuracies, and prints

                     weights  steps  seconds  forward, G  training, T  accuracy
    vit_small         random     52     17.3       0.108         0.27    49.17%
    resnet50          random     50     17.5       0.083         0.20    20.56%
    efficientnet_b0   random    116     24.5       0.008         0.05    25.00%

On your own images, from pretrained weights if you have the files (nothing is downloaded; DATA as for `vit finetune`):

    python examples/equal_compute.py DATA --img-size 224 --seconds 3600 --batch-size 64 --scale 0.35 --hflip 0.5 \\
        --device cuda --weights vit_small=vit.safetensors resnet50=resnet50-11ad3fa6.pth efficientnet_b0=effnet.pth
"""

import argparse
import copy
import time
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from labelled_images import DIGITS, Labelled, load_data
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vit
from vit.image import Transform
from vit.training import RandomCrop, Recipe, train

MODELS = ("vit_small", "resnet50", "efficientnet_b0")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of torchvision's weights


def make(name: str, file: str | None, classes: int, size: int) -> tuple[nn.Module, Transform]:
    """A model with a new head, from a file's weights or random ones, and the preprocessing of its images."""
    plain = vit.create_model("vit_small_patch16_224", num_classes=classes, img_size=size)
    if name == "vit_small":
        model = plain if file is None else vit.load_pretrained(file)
        model.reset_classifier(classes)
        return model, vit.create_transform(model, size=size, mode="squash")
    network = getattr(torchvision.models, name)()
    if file is not None:
        network.load_state_dict(torch.load(file, weights_only=True))
    if name == "resnet50":
        network.fc = nn.Linear(network.fc.in_features, classes)
    else:
        network.classifier[1] = nn.Linear(network.classifier[1].in_features, classes)
    return network, replace(vit.create_transform(plain, mode="squash"), **IMAGENET)


@torch.no_grad()
def multiply_adds(model: nn.Module, size: int) -> int:
    """Of one image's forward pass: of convolutions and matrix products."""
    twin = copy.deepcopy(model).cpu().eval()
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def timed(model: nn.Module, images: Labelled, recipe: Recipe, **settings: Any) -> tuple[float, list[dict]]:
    """Train; seconds per step, the first not counted, and the log, in which each step has its time."""
    rows: list[dict] = []
    clock = time.process_time if settings["device"] == "cpu" else time.perf_counter

    def log(row: dict) -> None:
        rows.append({**row, "time": clock()})

    with TemporaryDirectory() as folder:
        train(model, images, recipe, folder, validate_every=recipe.steps, log=log, **settings)
    steps = [row["time"] for row in rows if "loss" in row]
    return (steps[-1] - steps[0]) / (len(steps) - 1), rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default=DIGITS, help="as for vit finetune; default: scikit-learn's digits")
    parser.add_argument("-o", "--output", default="equal_compute.png")
    parser.add_argument("--seconds", type=float, default=20, help="of training, for each; default: %(default)s")
    parser.add_argument("--img-size", type=int, default=32, help="a multiple of 16; default: %(default)s")
    parser.add_argument("-b", "--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=0.7, help="the least share of a crop; default: %(default)s")
    parser.add_argument("--hflip", type=float, default=0.0, help="how often images are mirrored; default: %(default)s")
    parser.add_argument("--weights", nargs="+", default=[], metavar="MODEL=FILE", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    files = dict(one.split("=", 1) for one in args.weights)
    if unknown := set(files) - set(MODELS):
        parser.error(f"--weights: unknown model {min(unknown)!r}: expected {', '.join(MODELS)}")
    images, heldout, classes = load_data(args.data)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    print("                 weights  steps  seconds  forward, G  training, T  accuracy", flush=True)
    for name in MODELS:
        torch.manual_seed(0)
        model, transform = make(name, files.get(name), len(classes), args.img_size)
        recipe = Recipe(
            steps=11, warmup_steps=1, batch_size=args.batch_size, layer_decay=1.0, scale=args.scale, hflip=args.hflip
        )
        settings = {"augment": RandomCrop(transform, recipe.scale, recipe.hflip), "transform": transform}
        settings["device"] = args.device
        pace, _ = timed(copy.deepcopy(model), images, recipe, **settings)
        steps = max(2, round(args.seconds / pace))
        recipe = replace(recipe, steps=steps, warmup_steps=steps // 10)
        pace, rows = timed(model, images, recipe, validation=heldout, **settings)
        forward = multiply_adds(model, args.img_size)
        whole = 3 * forward * steps * args.batch_size
        accuracy = 100 * rows[-1]["accuracy"]
        print(
            f"{name:<16} {'file' if name in files else 'random':>7} {steps:6} {pace * steps:8.1f} {forward / 1e9:11.3f}"
            f" {whole / 1e12:12.2f} {accuracy:8.2f}%",
            flush=True,
        )
        training = [row for row in rows if "loss" in row]
        seconds = [row["time"] - rows[0]["time"] for row in training]
        means = [sum(row["loss"] for row in training[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(steps)]
        left.plot(seconds, means, label=name)
        right.plot(whole / 1e12, accuracy, "o")
        right.annotate(name, (whole / 1e12, accuracy), textcoords="offset points", xytext=(6, 4))
    left.set(xlabel="seconds of training", ylabel="training loss, mean of 10 steps")
    right.set(xlabel="multiply-adds of the training, in 10^12", ylabel="accuracy on held-out images, in %")
    right.set(xlim=(0, 1.35 * right.get_xlim()[1]), ylim=(0, 100))
    left.legend()
    figure.savefig(args.output, dpi=110)
