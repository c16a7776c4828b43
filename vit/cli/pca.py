"""The first three principal components of patch features, as red, green and blue."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit.draw import fit, mosaic
from vit.image import Transform, load_image
from vit.model import ViT

SIDE = 560  # pixels of a picture's long side in the result


@torch.inference_mode()
def draw_components(model: ViT, transform: Transform, paths: Sequence[Path], output: Path) -> int:
    """Draw each image beside the components of its patch features, a row per image; all images share the components."""
    photos = [load_image(path) for path in paths]
    weights = model.class_token
    images = [transform(photo).to(weights.device, weights.dtype) for photo in photos]
    (maps,) = model.forward_intermediates_packed(images, blocks=[-1], norm=True)  # each [D, h, w]
    sizes = ", ".join(f"{h} x {w}" for _, h, w in (one.shape for one in maps))
    pictures = []
    for photo, colours in zip(photos, principal_components([one.float().cpu() for one in maps])):
        seen = transform.view(photo).convert("RGB")
        size = fit(seen.size, SIDE)
        pictures.append([seen.resize(size), Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)])
    output.parent.mkdir(parents=True, exist_ok=True)
    mosaic([picture for row in pictures for picture in row], columns=2).save(output)
    print(f"{sizes} patches: {output.resolve()}")
    return 0


def principal_components(maps: Sequence[Tensor]) -> list[np.ndarray]:
    """[D, h, w] maps -> [h, w, 3] uint8 each: the first three principal components of all patches together.

    Each component's values from the 1st to the 99th percentile become 0 to 255. A component's sign is arbitrary; its
    largest weight is made positive, so that the same maps give the same colours.
    """
    tokens = torch.cat([one.flatten(1) for one in maps], dim=1).T.double()  # [patches, D]
    centred = tokens - tokens.mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # [D, D], the largest last
    directions = directions[:, -3:].flip(1)  # [D, 3]
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    values = (centred @ directions).numpy()  # [patches, 3]
    low, high = np.percentile(values, [1, 99], axis=0)
    scaled = (255 * ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)).round().astype(np.uint8)
    ends = np.cumsum([one[0].numel() for one in maps])[:-1]
    return [part.reshape(*one.shape[1:], 3) for part, one in zip(np.split(scaled, ends), maps)]
