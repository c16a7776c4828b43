"""Labelled images: their order, and which of a model's outputs is which class."""

import pytest
import torch
from torchvision.datasets import ImageFolder

import vit
from vit.cli import datasets
from vit.cli.datasets import draw_samples, find_samples, in_order, match_classes
from vit.image import create_transform
from vit.resources import digit_images, imagenet_categories, imagenet_synsets

DIGITS = "vit_digits_patch4_32"


def test_the_limit_draws_from_all_classes(labelled, rows):
    samples = find_samples(str(labelled))
    drawn = draw_samples(samples, 20, 0)
    assert len(set(drawn)) == 20 and set(drawn) <= set(samples) and drawn == draw_samples(samples, 20, 0)
    assert drawn != draw_samples(samples, 20, 1) and drawn != samples[:20]
    assert len({name for _, name in drawn}) > 5
    assert draw_samples(samples, 41, 0) == draw_samples(samples, None, 0) == samples
    _, (row,), _ = rows(labelled, "--model", DIGITS, "--limit", "20")
    assert row["images"] == 20


def test_images_and_order_are_image_folders(labelled):
    samples = find_samples(str(labelled))
    theirs = ImageFolder(labelled)
    assert {(str(path), theirs.class_to_idx[name]) for path, name in samples} == set(theirs.samples)
    assert len(samples) == len(theirs.samples)


def test_sorted_order_is_image_folders(tmp_path, digits, rows, place):
    """Names whose order by number, by case or by locale would differ; placed so that all must be right."""
    names = ["c10", "c2", "C3", "b", "a", "é", "z z", "1st", "_", "c1"]
    images, truth = digit_images()
    order = sorted(names)
    place(tmp_path, images[:100], [order[label] for label in truth[:100]])
    theirs = ImageFolder(tmp_path).class_to_idx
    found, rule = match_classes(sorted(theirs), digits.categories, 10)
    assert found == theirs and "sorted order" in rule
    code, (row,), _ = rows(tmp_path, "--model", DIGITS, "--mode", "squash")
    assert code == 0 and row["top1"] > 0.95 and row["classes"] == rule


def test_rules():
    synsets, categories = imagenet_synsets(), imagenet_categories()
    found, rule = match_classes([synsets[5], synsets[700]], categories, 1000)
    assert found == {synsets[5]: 5, synsets[700]: 700} and "synsets" in rule
    found, rule = match_classes([categories[3], categories[999]], categories, 1000)
    assert found == {categories[3]: 3, categories[999]: 999} and "categories" in rule
    found, rule = match_classes(["cat", "ant"], ["dog", "cat", "ant"], 3)
    assert found == {"cat": 1, "ant": 2} and "categories" in rule
    found, rule = match_classes(["0", "0017", "3"], None, 18)
    assert found == {"0": 0, "0017": 17, "3": 3} and "whole numbers" in rule
    found, rule = match_classes(["10", "9"], ["9", "10", *map(str, range(9))], 11)  # categories come first
    assert found == {"10": 1, "9": 0} and "categories" in rule


@pytest.mark.parametrize(
    ("names", "categories", "message"),
    [
        (["n01440764", "tench"], imagenet_categories(), "1 of 2 .*: 'tench'; expected ImageNet's synsets"),
        (["n01440764", "n00000000"], imagenet_categories(), "'n00000000'; expected ImageNet's synsets"),
        (["n01440764"], [f"c{i}" for i in range(1000)], "1 of 1 .*'n01440764'; expected the model's categories"),
        (["crane", "hen"], imagenet_categories(), "1 of 2 .*: 'crane'; expected the model's categories"),  # two cranes
        (["cat", "cow"], ["cat", "dog"], "1 of 2 .*'cow'; expected the model's categories"),
        (["1", "2", "3"], None, "1 of 3 .*'3'; expected whole numbers from 0 to 2"),  # not by their sorted order
        (["a", "b", "c", "d"], None, r"4 of 4 .*: 'a', 'b', 'c' \.\.\.; expected .* exactly 1000 sub-folders"),
    ],
)
def test_refused_classes(names, categories, message):
    count = len(categories) if categories else 3 if "1" in names else 1000
    with pytest.raises(ValueError, match=message) as error:
        match_classes(sorted(names), categories, count)
    assert "\n" not in str(error.value)


def test_numbers_that_two_orders_count_differently(tmp_path, rows, place):
    """The outputs are ImageFolder's: "10" and "11" before "2". A model that knows nothing of its classes is asked."""
    model = vit.load_pretrained(DIGITS)
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    model.reset_classifier(12)
    names = [str(i) for i in range(12)]
    place(tmp_path / "data", digit_images()[0][:60], [str(label.item()) for label in digit_images()[1][:60]])
    for name in ("10", "11"):
        place(tmp_path / "data", digit_images()[0][:1], [name])
    with torch.no_grad():
        model.head.bias.fill_(-100)
        for digit in range(10):
            output = ImageFolder(tmp_path / "data").class_to_idx[str(digit)]
            model.head.weight[output], model.head.bias[output] = weight[digit], bias[digit]
    file = vit.save_checkpoint(model, tmp_path / "m.safetensors")
    args = (tmp_path / "data", "--model", file, "--mode", "squash")
    code, found, err = rows(*args)
    assert code == 2 and not found and len(err) == 1
    assert "by number, '10' is output 10, but by text" in err[0] and "output 2: say which order" in err[0]
    assert "--class-order numeric or --class-order text" in err[0]
    _, (row,), _ = rows(*args, "--class-order", "text")
    assert row["top1"] > 0.9 and row["classes"] == "the sub-folders' text order"
    _, (row,), _ = rows(*args, "--class-order", "numeric")
    assert row["top1"] < 0.5
    model.categories = names[:2] + names[10:] + names[2:10]
    _, (row,), _ = rows(*args[:2], vit.save_checkpoint(model, tmp_path / "named.safetensors"), *args[3:])
    assert row["top1"] > 0.9 and "categories" in row["classes"]


@pytest.mark.parametrize(
    ("names", "count", "numeric", "text"),
    [
        (["1", "2", "10"], 3, [0, 1, 2], [0, 2, 1]),  # any three numbers
        (["-1", "0", "1", "-10"], 4, [1, 2, 3, 0], [0, 2, 3, 1]),
        (["3", "10"], 12, [3, 10], [5, 2]),  # the others are missing
        (["10", "11"], 12, [10, 11], [2, 3]),
        (["00", "03", "11"], 12, [0, 3, 11], [0, 3, 11]),
        (["0", "1"], 12, [0, 1], [0, 1]),
        ([str(i) for i in range(10)], 10, list(range(10)), list(range(10))),
    ],
)
def test_orders(names, count, numeric, text):
    assert list(in_order(names, "numeric", count).values()) == numeric
    assert list(in_order(names, "text", count).values()) == text
    if numeric != text:
        with pytest.raises(ValueError, match="say which order the model was trained with"):
            match_classes(sorted(names), None, count)
    else:
        assert list(match_classes(names, None, count)[0].values()) == numeric
    assert match_classes(["3", "10"], ["cat"] * 12, 12)[0] == {"3": 3, "10": 10}  # the categories have their order


def test_orders_that_cannot_be(digits):
    with pytest.raises(ValueError, match="2 of 3 .*'a', 'b'; expected whole numbers, because of --class-order numeric"):
        in_order(["1", "a", "b"], "numeric", 3)
    with pytest.raises(ValueError, match="1 of 2 .*'12'; expected exactly 12 sub-folders, or numbers from 0 to 11"):
        in_order(["1", "12"], "text", 12)
    with pytest.raises(ValueError, match="'3'; expected whole numbers from 0 to 2, or --class-order to count"):
        match_classes(["1", "2", "3"], None, 3)


def test_a_subset_of_imagenet(tmp_path, imagenet, rows, place):
    """In the folder of the model's first choice, all images are right; in that of its second choice, none."""
    model, file = imagenet
    transform = create_transform(model)
    images = digit_images()[0][:12]
    with torch.no_grad():
        best = model(torch.stack([transform(image) for image in images])).argsort(dim=1, descending=True)
    assert len(best[:, 0].unique()) > 3
    for choice, top1, top5 in ((0, 1.0, 1.0), (1, 0.0, 1.0), (4, 0.0, 1.0), (5, 0.0, 0.0)):
        folder = tmp_path / str(choice)
        place(folder, images, [imagenet_synsets()[output] for output in best[:, choice]])
        code, (row,), _ = rows(folder, "--model", file)
        assert code == 0 and (row["top1"], row["top5"]) == (top1, top5) and "synsets" in row["classes"]


def test_class_maps(tmp_path, digits, rows, place):
    """Other class names, by line and by number; the order of the lines is that of the outputs, not the sorted one."""
    images, truth = digit_images()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    place(tmp_path / "data", images[:60], [words[label] for label in truth[:60]])
    (tmp_path / "lines.txt").write_text("\n".join(words) + "\n")
    pairs = [f"{word}\t{i}" for i, word in enumerate(words)]
    (tmp_path / "pairs.txt").write_text("\n".join(pairs[::-1]) + "\n\n")
    options = ("--model", DIGITS, "--mode", "squash")
    for name in ("lines.txt", "pairs.txt"):
        code, (row,), _ = rows(tmp_path / "data", *options, "--class-map", tmp_path / name)
        assert code == 0 and row["top1"] > 0.95 and name in row["classes"]
    _, (row,), _ = rows(tmp_path / "data", *options)
    assert row["top1"] < 0.5  # the sorted order of the words differs


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\nb", "1 of 3 .*'c'; expected a line of .* for each"),
        ("a\nb\nc\na", "1 of 3 .*'a'; expected a line"),
        ("a 0\nb 1\nc 10", "gives 'c' output 10, but the model's outputs are 0 to 9"),
        ("".join(f"z{i}\n" for i in range(9)) + "a\nb\nc", "gives 'b' output 10"),
        ("a\n\nb\nc", "line 2 of .* is empty, expected the name of a class"),
        ("# classes\na\nb\nc", "line 1 of .* is a comment"),
        ("a 0\na 1\nb 2\nc 3", "1 of 3 .*'a'; expected a line"),
    ],
)
def test_refused_class_maps(lines, message, tmp_path):
    (tmp_path / "map.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        datasets.apply_class_map(["a", "b", "c"], tmp_path / "map.txt", 10)


def test_class_names_may_end_in_numbers(tmp_path):
    (tmp_path / "map.txt").write_text("boeing 737\nairbus 3\n")
    assert datasets.apply_class_map(["airbus 3"], tmp_path / "map.txt", 10) == {"airbus 3": 1}
