"""Labelled images in three parts: which folders are which, the images held out, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vit.cli.splits import find_splits, hold_out
from vit.resources import digit_images


@pytest.fixture
def tree(tmp_path):
    """Writes small images under the given names, relative to the test's folder; gives back the folder."""

    def tree(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2)).save(tmp_path / name)
        return tmp_path

    return tree


def names(root: Path, samples) -> list[tuple[str, str]]:
    return [(path.relative_to(root).as_posix(), name) for path, name in samples]


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{i:02}.png" for i in range(count)]


# Folders


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_folders_of_parts(tree, val):
    root = tree("train/a/1.png", "train/b/2.png", f"{val}/a/3.png", "test/b/4.png", "test/b/below/5.png")
    splits = find_splits(str(root), 0.5, 0)
    assert names(root, splits.train) == [("train/a/1.png", "a"), ("train/b/2.png", "b")]
    assert names(root, splits.val) == [(f"{val}/a/3.png", "a")]
    assert names(root, splits.test) == [("test/b/4.png", "b"), ("test/b/below/5.png", "b")]
    assert splits.how == f"train/, {val}/, test/" and splits.classes == ["a", "b"]


def test_without_val_a_part_of_train_is_held_out_and_the_test_is_not_touched(tree):
    root = tree(*numbered("train/a", 8), *numbered("train/b", 4), *numbered("test/a", 3))
    splits = find_splits(str(root), 0.25, 0)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [9, 3, 3]
    assert all("train/" in str(path) for path, _ in splits.train + splits.val)
    assert splits.how == "train/, test/, 3 images held out, drawn by class with seed 0"


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("invalid", "valid"), ("test", "other")])
def test_classes_may_have_the_names_of_parts(tree, classes):
    root = tree(*(f"{name}/{i}.png" for name in classes for i in range(4)))
    assert find_splits(str(root), 0.25, 0).classes == sorted(classes)


def test_train_alone_holds_the_classes(tree):
    root = tree(*numbered("train/a", 4), *numbered("train/b", 4))
    assert find_splits(str(root), 0.25, 0).classes == ["a", "b"]


# The hold-out


def test_the_hold_out_is_stratified_seeded_and_whole():
    samples = [
        (Path(f"{name}{i}"), name) for name, count in (("a", 50), ("b", 10), ("c", 3), ("d", 1)) for i in range(count)
    ]
    train, val = hold_out(samples, 0.2, 0)
    assert sorted(train + val) == sorted(samples) and train == [s for s in samples if s not in val]
    held = Counter(name for _, name in val)
    assert held == {"a": 10, "b": 2, "c": 1}  # 0.6 of c is rounded up: 12.8 images in all are 13
    assert hold_out(samples, 0.2, 0) == (train, val) and hold_out(samples, 0.2, 1)[1] != val
    assert Counter(name for _, name in hold_out(samples, 0.99, 0)[0]) == {"a": 1, "b": 1, "c": 1, "d": 1}


def test_few_images_of_many_classes_give_their_share_too():
    """Rounded class by class, 0.2 of 2 images would be none at all."""
    samples = [(Path(f"{name}{i}"), name) for name in "abcdefghij" for i in range(2)]
    held = hold_out(samples, 0.2, 0)[1]
    assert len(held) == 4 and len({name for _, name in held}) == 4
    assert {name for _, name in held} != {name for _, name in hold_out(samples, 0.2, 5)[1]}  # no class is preferred


def test_the_order_of_the_file_system_does_not_matter(tree, monkeypatch):
    root = tree(*numbered("a", 9), *numbered("b", 7), *numbered("c", 5))
    expected = find_splits(str(root), 0.3, 0)
    for method in ("iterdir", "rglob"):
        before = getattr(Path, method)
        monkeypatch.setattr(Path, method, lambda self, *args, before=before: reversed(list(before(self, *args))))
    assert find_splits(str(root), 0.3, 0) == expected


def test_the_digits():
    splits = find_splits("digits", 0.2, 0)
    assert len(splits.train) == 288 and len(splits.val) == 72 and splits.test == []
    assert splits.classes == [str(i) for i in range(10)]
    expected = Counter(digit_images()[1].tolist())
    for name, count in Counter(name for _, name in splits.val).items():
        assert abs(count - 0.2 * expected[int(name)]) < 1
    assert splits.how == "72 images held out, drawn by class with seed 0"


# CSV files


def csv_file(root: Path, text: str, **encoding: str) -> str:
    (root / "labels.csv").write_text(text, **encoding)
    return str(root / "labels.csv")


@pytest.mark.parametrize("header", ["", "path,label\n", "\ufeffFilename,class\r\n"])
def test_a_csv_file(tree, header, monkeypatch):
    root = tree("x/1.png", "x/2.png", "x/it's, 3.png", "4.png")
    file = csv_file(
        root, header + f'x/1.png,cat\nx/2.png, dog\n\n"x/it\'s, 3.png","cat"\n{root}/4.png,dog\n', encoding="utf-8"
    )
    monkeypatch.chdir("/")
    splits = find_splits(file, 0.5, 0)
    found = sorted(names(root, splits.train + splits.val))
    assert found == [("4.png", "dog"), ("x/1.png", "cat"), ("x/2.png", "dog"), ("x/it's, 3.png", "cat")]
    assert len(splits.val) == 2 and len({name for _, name in splits.val}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.png,a\n2.png,b\n9.png,a\n", r"line 3 of .*labels.csv names 9.png, but there is no file .*/9.png"),
        ("img,breed\n1.png,a\n", r"line 1 of .* names img, but there is no file"),  # not a header that is known
        ("path,label\n1.png\n", r"line 2 of .* is '1.png': expected a path and a label"),
        ("1.png,a,3\n", r"line 1 of .* is '1.png,a,3': expected a path and a label"),
        ("1.png,\n", r"line 1 of .* is '1.png,': expected"),
        ("1.png,a\n2.png,b\n1.png,b\n", r"line 3 of .* names 1.png again: expected each image once"),
        ('1.png,"a\n', "not a CSV file in UTF-8: unexpected end of data"),
        ("1.png,a\n2.png,a\n", "has one class, 'a': expected at least two"),
        ("path,label\n", "has no images: expected at least two classes"),
        ("", "has no images"),
        ("1.png,a\n2.png,b\n", "every class has one image only"),
    ],
)
def test_refused_csv_files(tree, text, message):
    with pytest.raises(ValueError, match=message) as error:
        find_splits(csv_file(tree("1.png", "2.png"), text), 0.2, 0)
    assert "\n" not in str(error.value)


def test_a_csv_file_in_another_encoding_or_missing(tree):
    root = tree("1.png")
    with pytest.raises(ValueError, match="is not a CSV file in UTF-8"):
        find_splits(csv_file(root, "1.png,é\n", encoding="latin-1"), 0.2, 0)
    with pytest.raises(FileNotFoundError, match="none.csv"):
        find_splits(str(root / "none.csv"), 0.2, 0)


# What is refused


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"], "class 'c' of .* has no training images"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png", "test/d/1.png"], r"class 'c' \(and 1 more\) of .*"),
        (["train/a/1.png", "val/a/1.png"], "has one class, 'a'"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"], "has val/ and valid/: keep the one"),
        (["val/a/1.png", "val/b/1.png", "test/a/1.png"], "has val/ and no train/"),
        (["train/1.png", "test/2.png"], "train holds 1 images and no sub-folders"),  # not two classes
        (["a/1.png", "a/2.png"], "has one class, 'a'"),
        (["a/1.png", "b/2.png"], "every class has one image only"),
    ],
)  # fmt: skip
def test_refused_folders(tree, files, message):
    with pytest.raises(ValueError, match=message):
        find_splits(str(tree(*files)), 0.2, 0)


def test_an_empty_class_is_refused(tree):
    root = tree("train/a/1.png", "train/b/1.png", "val/a/1.png")
    (root / "train" / "c").mkdir()
    with pytest.raises(ValueError, match="c holds no images"):
        find_splits(str(root), 0.2, 0)


@pytest.mark.parametrize("data", ["", "missing", __file__])
def test_what_is_no_data(data):
    with pytest.raises(ValueError, match="is not a folder"):
        find_splits(data, 0.2, 0)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_refused_shares(share):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        find_splits("digits", share, 0)
