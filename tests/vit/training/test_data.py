"""What a training step sees: random crops against torchvision's, and draws that follow from their place alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

import vit
from vit.training import Images, RandomCrop, balanced
from vit.training.data import batches, loader, own_generators, shares

MODEL = vit.ViT(vit.ViTConfig(img_size=(40, 48), patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=3))


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(90, 120), (20, 300), (300, 20), (33, 41)])
@pytest.mark.parametrize("scale", [0.05, 0.35])
def test_random_crops_are_torchvisions(shape, scale):
    """The same draws and the same pixels; the control: `resize(box=...)` reads pixels outside of the crop."""
    image = picture(*shape)
    ours = RandomCrop(vit.create_transform(MODEL, mode="squash"), scale, 0.5)
    crop = RandomResizedCrop((40, 48), (scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    flip = RandomHorizontalFlip(0.5)
    worst = 0
    for seed in range(12):
        torch.manual_seed(seed)
        found = np.asarray(ours.view(image))
        torch.manual_seed(seed)
        assert np.array_equal(found, np.asarray(flip(crop(image))))
        torch.manual_seed(seed)
        control = image.resize((48, 40), Image.Resampling.BICUBIC, box=ours.draw(*image.size))
        control = control.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else control
        worst = max(worst, np.abs(found.astype(int) - np.asarray(control)).max())
    assert worst > 5


def test_an_image_is_the_same_in_any_order():
    """Draws from all three generators follow from (seed, epoch, image)."""

    def noisy(image):
        return torch.rand(2) + random.random() + np.random.rand()

    data = Images([(picture(8, 8), 0)] * 3, noisy, seed=5)
    first = [data[0, i].image for i in range(3)]
    assert not torch.equal(first[0], first[1]) and not torch.equal(data[1, 0].image, first[0])
    random.random()
    torch.rand(7)
    assert all(torch.equal(data[0, i].image, first[i]) for i in (2, 0, 1))
    assert not torch.equal(Images(data.data, noisy, seed=6)[0, 0].image, first[0])


def test_workers_see_the_same_images():
    data = Images([(picture(60, 50), i) for i in range(6)], RandomCrop(vit.create_transform(MODEL), 0.3, 0.5), 0)
    keys = list(batches(6, 2, 0, 5, seed=0))
    one, two = (list(loader(data, keys, workers, torch.device("cpu"))) for workers in (0, 2))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two):
        assert torch.equal(a.image, b.image) and torch.equal(a.label, b.label)


def test_the_callers_generators_are_given_back():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    with own_generators(torch.device("cpu")):
        random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_batches_are_permutations_shared_by_processes():
    whole = list(batches(10, 4, 0, 6, seed=3))
    assert [len(keys) for keys in whole] == [4] * 6
    for epoch in range(3):
        numbers = [i for keys in whole[2 * epoch : 2 * epoch + 2] for e, i in keys if e == epoch]
        assert len(set(numbers)) == 8  # the two that are left out differ from epoch to epoch
    assert whole[0] != [(0, i) for _, i in whole[2]]
    assert list(batches(10, 4, 3, 6, seed=3)) == whole[3:]  # resumed, in the middle of an epoch
    halves = [list(batches(10, 4, 0, 6, 3, rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(keys) for keys in whole]


def test_shares_cover_all_images_with_equally_many_batches():
    for count, size, world in [(10, 4, 2), (5, 4, 3), (7, 2, 2), (1, 4, 2), (9, 3, 1)]:
        parts = [list(shares(count, size, rank, world)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert sorted(i for part in parts for keys in part for epoch, i in keys if epoch == 0) == list(range(count))


def test_what_data_may_hold(tmp_path):
    picture(30, 30).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not an image")
    items = [(tmp_path / "a.png", 1), (str(tmp_path / "b.png"), 2), {"image": picture(9, 9), "label": 0, "id": 7}]
    data = Images(items, vit.create_transform(MODEL), seed=0)
    good, bad, mapping = (data[0, i] for i in range(3))
    assert (good.label, good.weight, good.error) == (1, 1.0, "") and (mapping.label, mapping.weight) == (0, 1.0)
    assert bad.weight == 0.0 and bad.image.shape == good.image.shape and "b.png" in bad.error
    assert data[-1, 0].weight == 0.0 and torch.equal(data[-1, 0].image, good.image)
    assert data.name(0) == str(tmp_path / "a.png") and data.name(2) == "image 2"
    with pytest.raises(ValueError, match="each item must have 'image' and 'label', got 'img', 'fine_label': rename"):
        Images([{"img": picture(9, 9), "fine_label": 0}], data.transform, 0)[0, 0]


def test_transforms_get_upright_rgb_images():
    """As from torchvision's ImageFolder, so that transforms made for it work."""
    seen = []

    def look(image):
        seen.append(image)
        return torch.zeros(3, 8, 8)

    turned = Image.new("P", (20, 10))
    turned.getexif()[0x0112] = 6
    huge = Image.new("I", (9, 9))
    items = Images([(turned, 0), (huge, 1), (torch.ones(2), 2)], look, 0)
    assert [items[0, i].weight for i in range(3)] == [1.0, 0.0, 1.0]
    assert (seen[0].mode, seen[1].mode) == ("RGB", "RGB") and isinstance(seen[2], torch.Tensor)
    assert "image 1: images of mode 'I' hold 32-bit numbers" in items[0, 1].error
    Images([(turned, 0)], look, 0, channels=1)[0, 0]
    assert seen[-1].mode == "L"


def test_balanced_weights_make_classes_count_alike():
    labels = [0] * 6 + [1] * 3 + [2]
    weights = balanced(labels, 3)
    assert [sum(weights[label].item() for label in labels if label == c) for c in range(3)] == pytest.approx(
        [10 / 3] * 3
    )
