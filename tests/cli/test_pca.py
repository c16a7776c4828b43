"""`vit features --pca`: principal components of patch features as colours."""

import numpy as np
import torch
from PIL import Image

from vit.cli import main
from vit.cli.pca import principal_components

DIGITS = "vit_digits_patch4_32"


def test_principal_components_are_those_of_an_svd():
    maps = [torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(0)), torch.ones(8, 2, 3)]
    maps[0][2] *= 9  # the first component is this channel
    maps[0][5] *= 4
    colours = principal_components(maps)
    assert [one.shape for one in colours] == [(5, 7, 3), (2, 3, 3)]
    tokens = torch.cat([one.flatten(1) for one in maps], dim=1).T
    centred = tokens - tokens.mean(dim=0)
    _, _, rows = torch.linalg.svd(centred, full_matrices=False)
    for i in range(3):
        direction = rows[i] * rows[i][rows[i].abs().argmax()].sign()
        values = (centred @ direction).numpy()
        low, high = np.percentile(values, [1, 99])
        by_hand = 255 * ((values - low) / (high - low)).clip(0, 1)
        found = np.concatenate([one[..., i].ravel() for one in colours])
        assert np.abs(found - by_hand).max() <= 1
    assert all(np.array_equal(one, other) for one, other in zip(colours, principal_components(maps)))


def test_pca_draws_a_row_per_image(tmp_path, capsys):
    for name, size in (("a", (61, 33)), ("b", (24, 48))):
        Image.effect_noise(size, 80).save(tmp_path / f"{name}.png")
    images = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert main(["features", "--pca", *images, "--model", DIGITS, "-o", str(tmp_path / "new" / "c.png")]) == 0
    assert "8 x 15, 12 x 6 patches" in capsys.readouterr().out
    assert Image.open(tmp_path / "new" / "c.png").size == (2 * 560 + 8, round(560 * 32 / 60) + 8 + 560)
