"""k-NN and ridge against scikit-learn and plain loops; features and folded heads against the model itself."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FLOAT32, MINI, difference, images, randomize, refused_in_one_line
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import vit
from vit import probe
from vit.probe import POOLS, columns, extract, fold, knn, ridge

DEEP = MINI.override(depth=5, embed_dim=12)
MODELS = {
    "plain": DEEP,
    "avg": DEEP.override(global_pool="avg"),
    "fc_norm": DEEP.override(global_pool="avg", fc_norm=True),
    "registers, no head": DEEP.override(reg_tokens=3, num_classes=0, init_values=0.5),
    "distilled": DEEP.override(dist_token=True, global_pool="dist"),
}


def model(config: vit.ViTConfig) -> vit.ViT:
    return randomize(vit.ViT(config)).eval()


def data(n: int, D: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of unlike scale and mean that tell something about the classes, [n, D], and the classes, [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, D, generator=torch.Generator().manual_seed(9))
    features = centres[labels] + 2 * torch.randn(n, D, generator=generator)
    return features * torch.logspace(-2, 2, D) + torch.linspace(-3, 5, D), labels


# k nearest neighbours


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_knn_is_scikit_learns(temperature, monkeypatch):
    (train, labels), (test, _) = data(53, 7), data(19, 7, seed=1)
    whole = knn(train, labels, test, [1, 5, 53], temperature, classes=3)
    monkeypatch.setattr(probe, "SIMILARITIES", 4 * 53)  # four test images at a time
    parts = knn(train, labels, test, [1, 5, 53], temperature, classes=3)
    for k in (1, 5, 53):
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
        ).fit(train, labels)
        assert difference(whole[k] / whole[k].sum(dim=1, keepdim=True), torch.tensor(theirs.predict_proba(test))) < 1e-5
        assert difference(parts[k], whole[k]) < 1e-6
    equal = KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(train, labels).predict_proba(test)
    assert difference(whole[5] / whole[5].sum(dim=1, keepdim=True), torch.tensor(equal)) > 0.01  # weights matter


def test_votes_by_hand():
    train = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    votes = knn(train, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]]), [1, 3], 0.5, classes=4)
    assert votes[1][0].tolist() == pytest.approx([math.exp(2), 0, 0, 0])
    assert votes[3][0].tolist() == pytest.approx([math.exp(2), 1 + math.exp(-2), 0, 0])


# Ridge regression


@pytest.mark.parametrize(("n", "D"), [(61, 17), (23, 40)])  # by features, and by images
def test_ridge_is_scikit_learns(n, D):
    (train, labels), (test, _) = data(n, D), data(31, D, seed=1)
    train[:, 3] = test[:, 3] = 0.1  # tells nothing
    targets = 2 * torch.eye(3)[labels] - 1
    scaler = StandardScaler().fit(train.double())
    lambdas = [1e-3, 1.0, 1e4]
    found = ridge(train, labels, lambdas, 3)
    assert list(found) == lambdas
    for value, (weight, bias) in found.items():
        scores = test.double() @ weight.T + bias
        theirs = Ridge(alpha=value).fit(scaler.transform(train.double()), targets.double())
        assert difference(scores, torch.tensor(theirs.predict(scaler.transform(test.double())))) < 1e-6
        assert weight[:, 3].abs().max() == 0
    raw = torch.tensor(Ridge(alpha=1.0).fit(train.double(), targets.double()).predict(test.double()))
    assert difference(test.double() @ found[1.0][0].T + found[1.0][1], raw) > 0.01  # the standardisation matters


def test_the_bias_is_not_penalised():
    """As lambda grows the scores go to the shares of the classes, not to 0."""
    train, labels = data(50, 6)
    weight, bias = ridge(train, labels, [1e12], 3)[1e12]
    assert weight.abs().max() < 1e-6
    assert bias.tolist() == pytest.approx([2 * (labels == c).double().mean().item() - 1 for c in range(3)], abs=1e-6)


# The features


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_models(name):
    one = model(MODELS[name])
    x = images(2, 3, 20, 28)
    rows, parts = extract(one, x), columns(one)
    after = []
    for block in one.blocks:  # independent of `forward_intermediates`
        block.register_forward_hook(lambda module, args, result: after.append(result))
    with torch.no_grad():
        one(x)
        tokens = [one.norm(tokens) for tokens in after]
        P = one.config.num_prefix_tokens
        classes = [one.fc_norm(t[:, 0]) for t in tokens]
        mean = one.fc_norm(tokens[-1][:, P:].mean(dim=1))
    expected = {
        "class": classes[-1], "patch mean": mean, "class + patch mean": torch.cat([classes[-1], mean], dim=1),
        "last 4 class": torch.cat(classes[1:], dim=1),
        "last 4 class + patch mean": torch.cat([*classes[1:], mean], dim=1),
    }  # fmt: skip
    assert parts.keys() == expected.keys() and not rows.requires_grad
    for kind, where in parts.items():
        assert difference(rows[:, where], expected[kind]) <= FLOAT32
    assert difference(rows[:, parts["class"]], after[-1][:, 0]) > 0.1  # without the norm


def test_images_of_different_sizes():
    one = model(MODELS["registers, no head"])
    several = [images(3, 20, 28), images(3, 4, 4), images(3, 36, 8)]
    for row, image in zip(extract(one, several), several, strict=True):
        assert difference(row[None], extract(one, image[None])) <= FLOAT32


def test_shallow_models():
    one = model(MINI.override(depth=2))
    assert list(columns(one)) == [
        "class",
        "patch mean",
        "class + patch mean",
        "last 2 class",
        "last 2 class + patch mean",
    ]
    assert extract(one, images(1, 3, 8, 8)).shape == (1, 3 * 48) == (1, columns(one)["last 2 class + patch mean"].stop)
    assert list(columns(model(MINI.override(depth=1)))) == ["class", "patch mean", "class + patch mean"]


# Folded into the head


@pytest.mark.parametrize("features", POOLS)
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_the_probes_scores(name, features, tmp_path):
    one = model(MODELS[name])
    before = {key: value.clone() for key, value in one.state_dict().items()}
    x, labels = images(40, 3, 20, 28) + 3 * images(40, 3, 1, 1, seed=2), data(40, 1)[1]  # images of unlike colours
    rows = extract(one, x)[:, columns(one)[features]]
    weight, bias = ridge(rows, labels, [1.0], 3)[1.0]
    if one.config.fc_norm and features == "class + patch mean":
        return refused_in_one_line(lambda: fold(one, features, weight, bias, "abc"), "fc_norm goes with")
    file = vit.save_checkpoint(fold(one, features, weight, bias, "abc"), tmp_path / "m.safetensors")
    loaded = vit.load_pretrained(file)
    with torch.no_grad():
        logits = loaded(x)
        assert difference(logits.double(), rows.double() @ weight.T + bias) <= FLOAT32
        assert loaded.categories == ["a", "b", "c"] and loaded.head_dist is None
        loaded.config = loaded.config.override(global_pool="avg" if features == "class" else "token")
        if features != "class + patch mean":
            assert difference(loaded(x), logits) > 0.01  # another pooling
    assert one.config == MODELS[name] and all(
        torch.equal(before[key], value) for key, value in one.state_dict().items()
    )


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": torch.tensor([[1.0], [float("nan")]])}, "NaN or infinite"),
        ({"test": torch.tensor([[float("inf")]])}, "NaN or infinite"),
        ({"labels": torch.tensor([0, 2])}, "labels from 0 to 1, got 0 to 2"),
        ({"labels": torch.tensor([0])}, r"got \[2, 1\] and \[1\]"),
        ({"k": [3]}, "between 1 and 2, the number of training images, not .3."),
        ({"k": []}, "between 1 and 2"),
        ({"k": [0]}, "between 1 and 2"),
    ],
)
def test_refused_for_knn(change, message):
    right = {
        "train": torch.ones(2, 1),
        "labels": torch.tensor([0, 1]),
        "test": torch.ones(1, 1),
        "k": [1],
        "classes": 2,
    }
    knn(**right)
    refused_in_one_line(lambda: knn(**{**right, **change}), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": torch.full((2, 1), float("nan"))}, "NaN or infinite"),
        ({"labels": torch.tensor([0, -1])}, "labels from 0 to 1, got -1 to 0"),
        ({"lambdas": [1.0, 0.0]}, "lambda must be above 0"),
        ({"lambdas": []}, "lambda must be above 0"),
        ({"lambdas": [float("nan")]}, "lambda must be above 0"),
    ],
)
def test_refused_for_ridge(change, message):
    right = {"train": torch.eye(2), "labels": torch.tensor([0, 1]), "lambdas": [1.0], "classes": 2}
    ridge(**right)
    refused_in_one_line(lambda: ridge(**{**right, **change}), message)


def test_no_longer_than_it_was_meant_to_be():
    assert len(Path(probe.__file__).read_text().splitlines()) <= 120
