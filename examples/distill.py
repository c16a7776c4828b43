"""A small student learns from a fine-tuned teacher: "a good teacher is patient and consistent" (arXiv:2106.05237).

    python examples/distill.py -o student.safetensors

Takes 2 minutes on one core. Consistent: teacher and student see the same crop, blended by the same mixup; only mean
and std are each model's own. Patient: for as many steps as you can wait. The student learns what the teacher says of
these images, not their labels. It is a `vit_tiny` of 4 blocks and patches of 8, with random weights; the teacher is the
bundled model. The same student learns from the labels by `vit.training.train`, under the same recipe and with the same
crops. On the 360 held-out digits it prints

    teacher: 99.17%
    student of the labels: 73.33%
    student of the teacher: 68.89%

No gain: 300 steps are not patient, where the paper's students train for thousands of epochs; and 4 points on 360 images
may be chance. Two temperatures were tried on these images: at 2 it is 65.56 %. The loop is that of
`vit/training/loop.py` without what resumes it, with another loss. With your own teacher, which `vit finetune` has made,
and the images that it was made with:

    python examples/distill.py DATA --teacher run/model_best.safetensors --depth 12 --patch-size 16 --steps 20000 \\
        --batch-size 256 --scale 0.35 --hflip 0.5 --device cuda
"""

import argparse
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch
from labelled_images import DIGITS, Labelled, load_data
from torch import Tensor, nn
from torch.nn import functional as F

import vit
from vit.training import Images, RandomCrop, Recipe, evaluate, learning_rate, train
from vit.training.data import STEP, batches, loader, seed_from
from vit.training.loss import mixup
from vit.training.recipes import make_optimizer, set_rates


def renormalised(images: Tensor, given: vit.Preprocessing, wanted: vit.Preprocessing) -> Tensor:
    """[B, C, H, W] images with one model's mean and std -> the same with another's; blended ones too."""
    mean, std, new_mean, new_std = (
        images.new_tensor(values)[:, None, None] for values in (given.mean, given.std, wanted.mean, wanted.std)
    )
    return (images * std + mean - new_mean) / new_std


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits [B, classes], softened; its gradient is of the same size at any temperature."""
    logs = [(logits / temperature).log_softmax(dim=1) for logits in (student, teacher)]
    return temperature**2 * F.kl_div(*logs, reduction="batchmean", log_target=True)


def distill(
    student: vit.ViT, teacher: vit.ViT, images: Labelled, recipe: Recipe, temperature: float, device: str = "cpu"
) -> vit.ViT:
    """Train the student in place to say of each image what the teacher says of it; in eval mode when done."""
    crop = RandomCrop(vit.create_transform(student, mode="squash"), recipe.scale, recipe.hflip)
    crops = Images(images, crop, recipe.seed)
    keys = batches(len(images), recipe.batch_size, 0, recipe.steps, recipe.seed)
    optimizer = make_optimizer(student.to(device).train(), recipe)
    teacher.to(device).eval()
    for step, batch in enumerate(loader(crops, keys, 0, torch.device(device))):
        set_rates(optimizer, learning_rate(step, recipe.steps, recipe.warmup_steps))
        torch.manual_seed(seed_from(recipe.seed, STEP, step, 0, 0))
        x, _ = mixup(batch.image.to(device), batch.label, batch.weight, recipe.mixup)  # [B, C, H, W]
        with torch.no_grad():
            target = teacher(renormalised(x, student.preprocessing, teacher.preprocessing))  # [B, classes]
        optimizer.zero_grad()
        divergence(student(x), target, temperature).backward()
        nn.utils.clip_grad_norm_(student.parameters(), recipe.clip_grad)
        optimizer.step()
    return student.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default=DIGITS, help="as for vit finetune; default: scikit-learn's digits")
    parser.add_argument("-o", "--output", default="student.safetensors")
    parser.add_argument("--teacher", default="vit_digits_patch4_32", help="a checkpoint; default: %(default)s")
    parser.add_argument("--depth", type=int, default=4, help="the student's blocks; default: %(default)s")
    parser.add_argument("--patch-size", type=int, default=8, help="the student's; default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=0.7, help="the least share of a crop; default: %(default)s")
    parser.add_argument("--hflip", type=float, default=0.0, help="how often images are mirrored; default: %(default)s")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    images, heldout, classes = load_data(args.data)
    teacher = vit.load_pretrained(args.teacher)
    if teacher.categories != classes:
        parser.error(f"the teacher's classes are {teacher.categories}, those of the data {classes}")
    recipe = Recipe(
        lr=1e-3, layer_decay=1.0, steps=args.steps, warmup_steps=args.steps // 10, batch_size=args.batch_size,
        mixup=1.0, smoothing=0.0, scale=args.scale, hflip=args.hflip,
    )  # fmt: skip

    def accuracy(model: vit.ViT) -> float:
        return evaluate(model.to(args.device), Images(heldout, vit.create_transform(model), 0))[0]["accuracy"]

    def new_student() -> vit.ViT:
        torch.manual_seed(0)
        changes = {"depth": args.depth, "patch_size": args.patch_size, "img_size": teacher.preprocessing.size}
        student = vit.create_model("vit_tiny_patch16_224", num_classes=len(classes), **changes)
        own = student.preprocessing
        student.preprocessing = replace(teacher.preprocessing, mean=own.mean, std=own.std)
        student.categories = classes
        return student

    print(f"teacher: {accuracy(teacher):.2%}", flush=True)
    with TemporaryDirectory() as folder:
        student = train(new_student(), images, recipe, folder, device=args.device)
    print(f"student of the labels: {accuracy(student):.2%}", flush=True)
    student = distill(new_student(), teacher, images, recipe, args.temperature, args.device)
    print(f"student of the teacher: {accuracy(student):.2%}", flush=True)
    print(f"saved: {vit.save_checkpoint(student, args.output)}")
