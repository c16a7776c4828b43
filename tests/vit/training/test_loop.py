"""The loop: what a step computes, what a run writes, and where it stops."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import difference, randomize
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch import nn
from torch.nn import functional as F

import vit
from vit.training import Images, Recipe, evaluate, train
from vit.training.data import Item
from vit.training.distributed import precision
from vit.training.loop import backward, update_average
from vit.training.loss import mixup
from vit.training.run import read_log

CONFIG = vit.ViTConfig(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
QUICK = Recipe(steps=6, warmup_steps=1, batch_size=4, layer_decay=0.8, lr=1e-3)
CPU = torch.device("cpu")
OFF = torch.amp.GradScaler("cpu", enabled=False)


def model(**changes) -> vit.ViT:
    return randomize(vit.ViT(CONFIG.override(**changes)))


def data(count: int, classes: int = 3) -> list[tuple[Image.Image, int]]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    return [(Image.fromarray(one), i % classes) for i, one in enumerate(pixels)]


def batch(count: int = 4, seed: int = 1) -> Item:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Item(torch.randn(count, 3, 16, 16, generator=generator), labels, torch.ones(count), [""] * count)


def gradients(ours: nn.Module, given: Item, recipe: Recipe, weights=None) -> tuple[float, dict[str, torch.Tensor]]:
    ours.zero_grad()
    loss = backward(ours, given, recipe, 0, weights, OFF, precision(recipe.amp, CPU, "none"))
    return loss, {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}


# A step


def test_a_steps_loss_and_gradients_are_pytorchs():
    ours, given = model(), batch(5)
    loss, found = gradients(ours, given, Recipe(smoothing=0.2, batch_size=5))
    ours.zero_grad()
    expected = F.cross_entropy(ours(given.image), given.label, label_smoothing=0.2)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in ours.named_parameters():
        assert difference(found[name], parameter.grad) < 1e-5, name


def test_accumulation_is_one_large_batch():
    """With weights that differ between the parts: each part's own mean would be wrong."""
    ours, given = model(), batch(6)
    given.weight[0] = 0.0
    weights = torch.tensor([0.2, 1.0, 3.0])
    whole, expected = gradients(ours, given, Recipe(batch_size=6), weights)
    parts, found = gradients(ours, given, Recipe(batch_size=6, grad_accum_steps=3), weights)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert all(difference(found[name], expected[name]) < 1e-5 for name in expected)


def test_an_image_of_weight_0_has_no_part_in_it():
    ours, given = model(), batch(4)
    given.weight[2] = 0.0
    loss, found = gradients(ours, given, Recipe(batch_size=4))
    three = Item(*(field[[0, 1, 3]] for field in given[:3]), [""] * 3)
    expected, same = gradients(ours, three, Recipe(batch_size=3))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert all(difference(found[name], same[name]) < 1e-5 for name in same)


def test_class_weights_are_pytorchs():
    ours, given, weights = model(), batch(5), torch.tensor([0.5, 2.0, 1.0])
    loss, _ = gradients(ours, given, Recipe(batch_size=5, smoothing=0.0), weights)
    assert loss == pytest.approx(F.cross_entropy(ours(given.image), given.label, weight=weights).item(), rel=1e-6)


def test_mixup_blends_images_and_their_losses():
    torch.manual_seed(0)
    x, y, w = batch(4).image, torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    blended, ((y1, w1), (y2, w2)) = mixup(x, y, w, 0.8)
    share = w1[0].item()
    assert 0 < share < 1 and torch.equal(y1, y) and torch.equal(y2, y.roll(1))
    assert difference(blended, share * x + (1 - share) * x.roll(1, 0)) < 1e-6
    assert torch.allclose(w1 + w2, share * w + (1 - share) * w.roll(1)) and (w1 + w2).sum() == pytest.approx(3.0)
    assert mixup(x, y, w, 0.0)[0] is x


def test_checkpointing_changes_no_bit(tmp_path):
    """Drop path is drawn again in the backward pass, as it was in the forward pass."""
    recipe = Recipe(steps=4, warmup_steps=1, batch_size=4, drop_path=0.5)
    one, two = (train(model(grad_checkpointing=flag), data(12), recipe, tmp_path / str(flag)) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@torch.no_grad()
def test_the_average_follows_the_weights_and_copies_buffers():
    one, two = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    two.weight.fill_(3.0), two.running_mean.fill_(7.0)
    update_average(one, two, 0.75)
    assert one.weight.tolist() == [1.5] * 4 and one.running_mean.tolist() == [7.0] * 4


# A run


def test_a_run_writes_what_it_did(tmp_path):
    ours, images = model(), data(14)
    recipe = Recipe(steps=6, warmup_steps=1, batch_size=4, lr=2e-3, model_ema_decay=0.9)
    ours.categories = ["a", "b", "c"]
    shown = []
    result = train(ours, images, recipe, tmp_path, validation=images[:5], log=shown.append)
    rows = read_log(tmp_path / "log.jsonl")
    assert rows == shown and [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "accuracy" in row] == [3, 6]
    loaded = vit.load_pretrained(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.parameters()))
    assert not result.training and loaded.categories == ["a", "b", "c"]
    assert json.loads(loaded.provenance.parent.recipe)["lr"] == 2e-3
    best = vit.load_pretrained(tmp_path / "model_best.safetensors")
    top = max(row["accuracy"] for row in rows if "accuracy" in row)
    assert accuracy(best, images[:5]) == pytest.approx(top)


def test_a_lower_loss_decides_between_equal_accuracies(tmp_path, monkeypatch):
    """Also between one before and one after an interruption."""
    losses = {1: 2.0, 2: 1.0, 3: 1.5, 4: 0.5, 5: 0.1}
    right = {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.4}
    weights, recipe = {}, Recipe(steps=5, warmup_steps=0, batch_size=4, lr=1e-2)

    def run(out, end=0):
        ours, done = model(), [record["step"] for record in read_log(out / "log.jsonl")] if out.exists() else []
        steps = iter(range(max(done, default=0) + 1, 6))

        def judge(*_):
            step = next(steps)
            weights[step] = ours.head.weight.detach().clone()
            return {"accuracy": right[step], "val_loss": losses[step]}, []

        def stop(record):
            if record["step"] == end and "accuracy" not in record:
                raise KeyboardInterrupt

        monkeypatch.setattr("vit.training.loop.evaluate", judge)
        train(ours, data(8), recipe, out, validation=data(4), validate_every=1, log=stop)

    run(tmp_path / "whole")
    best = vit.load_pretrained(tmp_path / "whole" / "model_best.safetensors")
    assert torch.equal(best.head.weight, weights[4]) and not torch.equal(weights[4], weights[2])
    for end in (3, 4, 5):
        out = tmp_path / f"{end}"
        with pytest.raises(KeyboardInterrupt):
            run(out, end)
        (out / "log.jsonl").write_text(
            "".join(f"{line}\n" for line in (out / "log.jsonl").read_text().splitlines()[:-1])
        )
        run(out)
        best = vit.load_pretrained(out / "model_best.safetensors")
        assert torch.equal(best.head.weight, weights[4]), end


def accuracy(ours: vit.ViT, images: list) -> float:
    transform = vit.create_transform(ours)
    with torch.no_grad():
        return np.mean([ours(transform(image)[None]).argmax().item() == label for image, label in images])


def test_the_average_is_that_of_a_float64_loop(tmp_path):
    """And it goes on where an interrupted run has left it."""
    recipe = Recipe(steps=8, warmup_steps=1, batch_size=4, model_ema_decay=0.6, lr=1e-2)
    ours = model()
    expected = {name: parameter.detach().double() for name, parameter in ours.named_parameters()}

    def follow(record):
        decay = min(0.6, (1 + record["step"]) / (10 + record["step"]))
        for name, parameter in ours.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()

    def stop(record):
        if record["step"] == 6:
            raise KeyboardInterrupt

    whole = train(ours, data(12), recipe, tmp_path / "whole", log=follow)
    for name, parameter in whole.named_parameters():
        assert difference(parameter.detach(), expected[name].float()) < 1e-5, name
        assert difference(ours.get_parameter(name).detach(), expected[name].float()) > 1e-5, name
    with pytest.raises(KeyboardInterrupt):
        train(model(), data(12), recipe, tmp_path / "parts", save_every=4, log=stop)
    resumed = train(model(), data(12), recipe, tmp_path / "parts", save_every=4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_frozen_parameters_stay_to_the_bit(tmp_path):
    ours = model()
    before = copy.deepcopy(ours)
    train(ours, data(12), Recipe(steps=3, warmup_steps=0, batch_size=4, freeze=1, lr=1e-2), tmp_path)
    for (name, a), b in zip(ours.named_parameters(), before.parameters()):
        frozen = not name.startswith(("blocks.1", "norm", "head"))
        assert torch.equal(a, b) == frozen, name


class Small(nn.Module):
    """A convolution, BatchNorm and a head, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_any_module_is_trained(tmp_path):
    transform = vit.create_transform(model())
    torch.manual_seed(0)
    ours = Small()
    recipe = Recipe(steps=4, warmup_steps=0, batch_size=4, layer_decay=1.0, model_ema_decay=0.5)
    result = train(ours, data(8), recipe, tmp_path, augment=transform, transform=transform, validation=data(4))
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == result.state_dict().keys() and state["norm.num_batches_tracked"] == 4
    assert all(torch.equal(state[name], value) for name, value in result.state_dict().items())
    with pytest.raises(ValueError, match="give augment= and transform= for Small"):
        train(Small(), data(8), recipe, tmp_path / "other")


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_half_precision_trains(amp, tmp_path):
    """Under autocast: weights and their updates stay in float32."""
    recipe = Recipe(steps=4, warmup_steps=0, batch_size=4, amp=amp)
    result = train(model(), data(8), recipe, tmp_path, validation=data(4))
    float32 = train(model(), data(8), Recipe(steps=4, warmup_steps=0, batch_size=4), tmp_path / "float32")
    assert {parameter.dtype for parameter in result.parameters()} == {torch.float32}
    assert 0 < difference(result.head.weight, float32.head.weight) < 0.2


def test_evaluation_is_scikit_learns(tmp_path):
    ours, images = model(), data(11)
    found, errors = evaluate(ours.eval(), Images(images, vit.create_transform(ours), 0), batch_size=4)
    with torch.no_grad():
        logits = torch.cat([ours(vit.create_transform(ours)(image)[None]) for image, _ in images])
    truth = torch.tensor([label for _, label in images])
    assert errors == [""] * 11 and found["val_loss"] == pytest.approx(F.cross_entropy(logits, truth).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == truth).float().mean().item())
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, logits.argmax(1)))


# Where it stops


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """The state before it is kept, and the images are named."""
    images = data(8)

    def broken(image):
        pixels = vit.create_transform(model())(image)
        return pixels * float("nan") if image is images[3][0] else pixels

    recipe = Recipe(steps=6, warmup_steps=0, batch_size=2)
    with pytest.raises(ValueError, match=r"at step \d the loss is nan .*image 3.*: lower lr, or look at these images"):
        train(model(), images, recipe, tmp_path, augment=broken, save_every=1)
    for file in tmp_path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in vit.load_pretrained(file).state_dict().values())


def test_unreadable_images_are_left_out_up_to_a_number(tmp_path, capsys):
    images = [*data(7), (tmp_path / "missing.png", 0)]
    train(model(), images, QUICK, tmp_path / "run", max_bad=1)
    err = capsys.readouterr().err
    assert err.count("missing.png") == 1
    assert err.endswith(f"{tmp_path / 'run'}: unreadable images left out: 1, named above\n")
    with pytest.raises(ValueError, match=r"1 images cannot be used, more than max_bad=0 \(--max-bad\): .*missing.png"):
        train(model(), images, QUICK, tmp_path / "strict")


@pytest.mark.parametrize(
    "change, text",
    [
        (
            {"recipe": Recipe(batch_size=64)},
            "batch_size 64 is more than the 8 training images: choose 8 or less (-b 8)",
        ),
        ({"data": [(one, 3) for one, _ in data(8)]}, "there is an image with label 3, and the model has 3 classes"),
        ({"data": [(one, -1) for one, _ in data(8)]}, "label -1"),
        ({"model": model().to(torch.bfloat16)}, "the weights are torch.bfloat16: train them in float32"),
        ({"strategy": "dpp"}, "unknown strategy 'dpp'"),
        ({"strategy": "ddp"}, "needs processes: start with torchrun"),
    ],
)
def test_arguments_that_do_not_fit(change, text, tmp_path):
    given = {"model": model(), "data": data(8), "recipe": QUICK, "out": tmp_path} | change
    with pytest.raises(ValueError) as caught:
        train(given.pop("model"), given.pop("data"), given.pop("recipe"), given.pop("out"), **given)
    assert text in str(caught.value)


def test_an_optimized_model_is_refused(tmp_path):
    optimized = vit.kernels.optimize(model().eval(), "float32")
    with pytest.raises(ValueError, match="an optimized model cannot be trained: train the model that it was made from"):
        train(optimized, data(8), QUICK, tmp_path)


def test_what_the_caller_has_frozen_stays_frozen(tmp_path):
    ours = model()
    ours.patch_embed.requires_grad_(False)
    before = ours.patch_embed.proj.weight.clone()
    train(ours, data(8), Recipe(steps=2, warmup_steps=0, batch_size=4, lr=1e-2), tmp_path)
    assert torch.equal(ours.patch_embed.proj.weight, before)


def test_a_parameter_that_is_never_used_does_not_end_a_run(tmp_path):
    """Nor may tied weights: both come after an epoch's work otherwise."""

    def make():
        torch.manual_seed(0)
        ours = Small()
        ours.unused = nn.Linear(2, 2)
        ours.tied = nn.Module()
        ours.tied.weight = ours.head.weight
        return ours

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    transform = vit.create_transform(model())
    recipe = Recipe(steps=4, warmup_steps=0, batch_size=4, layer_decay=1.0)
    arguments = {"augment": transform, "transform": transform, "save_every": 2}
    whole = train(make(), data(8), recipe, tmp_path / "whole", **arguments)
    with pytest.raises(KeyboardInterrupt):
        train(make(), data(8), recipe, tmp_path / "parts", log=stop, **arguments)
    resumed = train(make(), data(8), recipe, tmp_path / "parts", **arguments)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_other_labels_are_another_run(tmp_path):
    train(model(), data(8), Recipe(steps=2, warmup_steps=0, batch_size=4), tmp_path)
    turned = [(image, 2 - label) for image, label in data(8)]
    with pytest.raises(ValueError, match=r"holds another run \(labels \[0, 1, 2"):
        train(model(), turned, Recipe(steps=2, warmup_steps=0, batch_size=4), tmp_path)


def test_no_readable_validation_image(tmp_path):
    bad = [(tmp_path / "missing.png", 0)]
    with pytest.raises(ValueError, match="no validation image can be used: .*missing.png"):
        train(model(), data(8), QUICK, tmp_path / "run", validation=bad, max_bad=5)
