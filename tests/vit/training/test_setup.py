"""What a run is given: data that cannot be used, labels that do not fit, and what makes it another run."""

import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import vit
from vit.training import Recipe, train
from vit.training.data import pair
from vit.training.setup import some_pictures
from vit.training.state import change

CONFIG = vit.ViTConfig(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
RECIPE = Recipe(steps=2, warmup_steps=0, batch_size=2)


def model(classes: int = 3) -> vit.ViT:
    return vit.ViT(CONFIG.override(num_classes=classes))


def data(count: int = 6, seed: int = 0, classes: int = 3) -> list[tuple[Image.Image, int]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    return [(Image.fromarray(one), i % classes) for i, one in enumerate(pixels)]


class Lazy:
    """A data set that makes an item when it is asked for, as those that decode do."""

    def __init__(self, items) -> None:
        self.items, self.asked = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        self.asked += 1
        return self.items[i]


# Another run


def test_other_pictures_are_another_run(tmp_path):
    """As many of the same size, with the same labels; of one picture among few, too."""
    train(model(), data(), RECIPE, tmp_path, validation=data(3))
    train(model(), data(), RECIPE, tmp_path, validation=data(3))  # the control
    one = data()
    one[4] = data(seed=1)[4]
    for changed, validation in ((data(seed=1), data(3)), (one, data(3)), (data(), data(3, seed=1))):
        with pytest.raises(ValueError, match=r"holds another run \(other pictures\): repeat the command"):
            train(model(), changed, RECIPE, tmp_path, validation=validation)


def test_pictures_are_told_apart_in_every_form(tmp_path):
    for i, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / name)
    array = np.arange(12.0)
    forms = [
        tmp_path / "a.png", str(tmp_path / "b.png"), tmp_path / "missing.png", Image.new("RGB", (9, 9)),
        Image.new("L", (27, 9)), array, array + 1, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16),
        torch.tensor(True), torch.zeros(2, 3), {"bytes": b""}, b"",
    ]  # fmt: skip
    found = [some_pictures([(form, 0)]) for form in forms]
    assert len(set(found)) == len(forms) and found == [some_pictures([(form, 0)]) for form in forms]
    assert some_pictures([]) == ""


def test_few_items_are_asked_for():
    for count in (1, 7, 8, 9, 15, 1000):
        items = Lazy([(Image.new("L", (2, 2)), 0)] * count)
        some_pictures(items)
        assert items.asked == min(count, 8)


class Drawing(Lazy):
    """A data set that augments by itself, with the global generators."""

    def __getitem__(self, i: int):
        image, label = pair(self.items[i])
        return torch.rand(3) + random.random() + np.random.rand() + float(np.asarray(image).mean()), label


def test_a_data_set_that_draws_is_the_same_one():
    """And the caller's generators stay where they were."""
    torch.manual_seed(5)
    one = some_pictures(Drawing(data()))
    after = torch.rand(1)
    torch.manual_seed(6)
    random.seed(6)
    np.random.seed(6)
    assert some_pictures(Drawing(data())) == one != some_pictures(Drawing(data(seed=1)))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)


def test_changes_fit_on_a_line(tmp_path):
    assert change("lr", 0.1, 1.0) == "lr 0.1, now 1.0"
    assert change("data", "0" * 64, "1" * 64) == "other data"
    counts = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
    assert change("images of each class", counts, {**counts, "b": 7}) == "images of each class: b 2, now 7"
    assert change("n", counts, {}) == "n: a 1, now 0, b 2, now 0, c 3, now 0 and 2 more"


def test_a_class_that_has_changed_is_named(tmp_path):
    ours = model()
    ours.categories = ["cat", "dog", "owl"]
    recipe = Recipe(steps=2, warmup_steps=0, batch_size=2)
    train(ours, data(60), recipe, tmp_path)
    with pytest.raises(ValueError) as caught:
        train(ours, data(59), Recipe(steps=3, warmup_steps=0, batch_size=2), tmp_path)
    assert (
        f"{tmp_path} holds another run (steps 2, now 3, other labels, images of each class: owl 20, now 19,"
        " other pictures, images 60, now 59): repeat the command that began it, or choose another folder;"
        f" to train its weights for more steps: --model {tmp_path / 'model.safetensors'} -o ANOTHER"
    ) == str(caught.value)


# Labels


@pytest.mark.parametrize("lazy", [False, True])
def test_a_head_for_more_classes_than_there_are_labels(lazy, tmp_path):
    images = data(classes=2)
    with pytest.warns(UserWarning, match=r"the largest label is 1, and the model has 10 .*model.reset_classifier\(2\)"):
        train(model(10), Lazy(images) if lazy else images, RECIPE, tmp_path)


def test_a_head_that_fits_does_not_warn(tmp_path):
    """Nor one whose largest label is not among those that are looked at, of a data set that decodes."""
    rare = data(3) * 134  # every second label is looked at
    rare[1::2] = [(image, 3) for image, _ in rare[1::2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(model(), data(), RECIPE, tmp_path / "a")
        train(model(), data(classes=2), RECIPE, tmp_path / "b", validation=data(3))
        train(model(4), Lazy(rare), RECIPE, tmp_path / "c")


# Data


@pytest.mark.parametrize("make", [DataLoader, iter, lambda images: (pair for pair in images)])
@pytest.mark.parametrize("part", ["data", "validation"])
def test_what_has_no_numbered_items(make, part, tmp_path):
    given = {"data": data(), "validation": data()}
    given[part] = make(given[part])
    with pytest.raises(ValueError, match="expected data with len.* got a .*: pass the Dataset, not a DataLoader"):
        train(model(), given["data"], RECIPE, tmp_path, validation=given["validation"])


@pytest.mark.parametrize("part", ["data", "validation"])
def test_tensors_need_transforms(part, tmp_path):
    tensors = [(torch.ones(3, 16, 16), i % 3) for i in range(6)]
    given = {"data": data(), "validation": data()} | {part: tensors}
    with pytest.raises(ValueError, match="are of type Tensor, expected paths or PIL .* give augment= and transform="):
        train(model(), given["data"], RECIPE, tmp_path, validation=given["validation"])
    own = {"augment": torch.clone, "transform": torch.clone}
    train(model(), tensors, RECIPE, tmp_path, validation=tensors, **own)


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match="there are no training images"):
        train(model(), [], RECIPE, tmp_path)
