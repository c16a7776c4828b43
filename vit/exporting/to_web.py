"""To a page in the browser: a folder of static files that shows what a model sees, checked before it gets its name."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit.files import check_place, replace_folder
from vit.image import create_transform, load_image, to_cover, to_mode
from vit.maps import attention_maps
from vit.model import ViT
from vit.packed import Grid
from vit.resources import DATA, digit_images

from . import gate, page_graph, to_onnx, web_runtime
from .int8 import MOST as IMAGES
from .int8 import Images, images_for, quantized
from .metadata import Metadata
from .pixels import FILTERS
from .runtimes import OnnxRuntime

PAGE = Path(__file__).parent / "page"
MODEL, FACTS, EXAMPLE, LICENCE = "model.onnx", "model.json", "example.png", "onnxruntime-web.LICENSE.txt"
FILES = {*(file.name for file in PAGE.iterdir()), *web_runtime.SHA256, MODEL, FACTS, EXAMPLE, LICENCE}
KEY = "vit"  # in FACTS, the version that wrote the folder
DIGITS = "vit_digits_patch4_32"
SCALES = (0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75, 2)  # of the own size, on the slider
TOKENS = 1024  # on the slider, if the own size does not have more
MAPS, ENDS = 0.99, 0.995  # int8, the least cosine of what is only looked at; and of answers at the slider's ends
READS = {  # what the classifier reads
    "token": "The class token has collected what it needs",
    "avg": "The mean of the patches is what the answer rests on",
    "token_avg": "The class token stands beside the mean of the patches",
    "dist": "The class token and the distillation token each have a say",
}
LEVELS = 5  # of grey: by so much do versions of Pillow differ that resize rows or columns first
MOST = 6  # pictures to check on
EXAMPLE_SIDE = 1024  # pixels, at most, of the picture that the page opens with
OTHERS = 16  # images that are also calibrated on at each other size


def write(
    model: ViT,
    path: Path,
    metadata: Metadata,
    calibrate: Tensor | Sequence[Tensor] | None,
    runtime_folder: str | Path | None,
    example: str | Path | Image.Image | None,
    check: bool,
    force: bool,
) -> tuple[tuple[str, ...], int, Metadata, dict[str, float]]:
    """Write the folder: the names of its files, their bytes, the metadata with the check's figures, and seconds."""
    first = example_for(model, example)
    runtime = web_runtime.runtime_files(runtime_folder)
    start = time.perf_counter()
    int8 = metadata.precision == "int8"
    if int8 and calibrate is None and is_digits(model):
        calibrate = [create_transform(model)(image) for image in digit_images()[0]]  # photographs are unlike them
    images = images_for(model, calibrate) if int8 else Images([], [])
    twin = quantized(model, at_all_sizes(model, images.used)) if int8 else model
    converted = page_graph.convert(twin, metadata)
    seconds = {"convert": time.perf_counter() - start}
    with building(path) as folder:
        file = folder / MODEL
        to_onnx.save(converted, metadata, file)
        if check:
            start = time.perf_counter()
            pictures = [picture_of(model, image) for image in images.held_out] if int8 else photographs()
            rows = compare(model, file, pictures[:MOST], metadata)
            gate.judge(rows)
            metadata = replace(metadata, parity=tuple(rows))
            to_onnx.save(converted, metadata, file)
            seconds["check"] = time.perf_counter() - start
        for asset in (*PAGE.iterdir(), *runtime):
            shutil.copyfile(asset, folder / asset.name)
        (folder / LICENCE).write_text(web_runtime.licence(), encoding="utf-8")
        first.save(folder / EXAMPLE)
        (folder / FACTS).write_text(json.dumps(facts(model, metadata, folder, first)), encoding="utf-8")
        assert {one.name for one in folder.iterdir()} == FILES
        total = sum(one.stat().st_size for one in folder.iterdir())
        check_folder(path, force)  # again: another process may have written one in between
    names = sorted(FILES, key=lambda name: (name != "index.html", name))
    return tuple(str(path / name) for name in names), total, metadata, seconds


def check(model: ViT) -> None:
    """ValueError for a model that no page can show."""
    if model.config.in_chans not in (1, 3):
        raise ValueError(f"a page shows pictures of 1 or 3 channels, and the model takes {model.config.in_chans}")
    if (kind := model.preprocessing.interpolation) not in FILTERS:
        raise ValueError(f"a page resizes by {', '.join(FILTERS)}, and model.preprocessing asks for {kind!r}")


def facts(model: ViT, metadata: Metadata, folder: Path, example: Image.Image) -> dict[str, Any]:
    """What the page has to know of its model."""
    config, steps = model.config, grids(model)
    own = own_grid(model)
    output = "logits" if config.num_classes else "features"
    with torch.inference_mode():
        values = model(create_transform(model)(example)[None])[0].tolist()
    return {
        KEY: version("vit-small"),
        "name": name_of(model),
        "file": MODEL,
        "bytes": (folder / MODEL).stat().st_size,
        "runtime": {"file": web_runtime.WASM, "bytes": (folder / web_runtime.WASM).stat().st_size},
        "precision": metadata.precision,
        "patch": config.patch_size,
        "channels": config.in_chans,
        "width": config.embed_dim,
        "features": config.embed_dim * (1 + (config.global_pool == "token_avg")),
        "reads": f"{READS[config.global_pool]}; one linear layer turns it into a number for each class.",
        "depth": config.depth,
        "heads": config.num_heads,
        "prefix": config.num_prefix_tokens,
        "classes": config.num_classes,
        "categories": metadata.categories,
        "grids": steps,  # [rows, columns] of patches, one for each step of the slider
        "covers": [cover_of(model, step) for step in steps],
        "own": steps.index(own),
        "draw": is_digits(model),
        "example": {"file": EXAMPLE, "output": output, "values": values},  # of PyTorch, at the own size
    }


def name_of(model: ViT) -> str:
    """What to call a model."""
    return Path(model.provenance.source).stem if model.provenance else "a Vision Transformer"


def is_digits(model: ViT) -> bool:
    """Whether it is the model of scikit-learn's digits that ships, for which one can draw."""
    return model.provenance is not None and model.provenance.source == DIGITS


def example_for(model: ViT, example: str | Path | Image.Image | None) -> Image.Image:
    """The picture that the page opens with, in RGB: the caller's, or one that ships."""
    if example is None:
        example = digit_images()[0][2] if is_digits(model) else DATA / "photographs" / "coffee.jpg"
    picture = to_mode(example if isinstance(example, Image.Image) else load_image(example), 3).copy()
    picture.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    picture.info = {}  # where it was taken; and its colours' profile, which browsers apply and Pillow does not
    return picture


def own_grid(model: ViT) -> Grid:
    """(rows, columns) of patches at the model's own size."""
    h, w = (side // model.config.patch_size for side in model.preprocessing.size)
    return h, w


def grids(model: ViT) -> list[Grid]:
    """The steps of the slider, (rows, columns) of patches in about the proportions of the own size."""
    h, w = own_grid(model)
    steps = sorted({(max(1, round(h * scale)), max(1, round(w * scale))) for scale in SCALES})
    # a graph rounds in one way, and timm squares in another
    alike = [step for step in steps if (step[0] == step[1]) == (h == w)]
    return [(rows, columns) for rows, columns in alike if rows * columns <= max(TOKENS, h * w)]


def cover_of(model: ViT, grid: Grid) -> tuple[int, int]:
    """The pixels that a picture is resized to cover at a step of the slider, before the crop, if there is one."""
    p, settings = model.config.patch_size, model.preprocessing
    size = (grid[0] * p, grid[1] * p)
    return to_cover(size, settings.crop_pct) if settings.mode == "crop" else size


def checked_grids(model: ViT) -> list[Grid]:
    """The grids at which a page is calibrated and checked: the model's own and the slider's ends."""
    steps = grids(model)
    return list(dict.fromkeys((own_grid(model), steps[0], steps[-1])))


def at_all_sizes(model: ViT, images: list[Tensor]) -> list[Tensor]:
    """Images [C, H, W] to calibrate on, some of them also at the other sizes, since a page shows what sizes do."""
    p, (_, *others) = model.config.patch_size, checked_grids(model)
    some = images[:: max(1, len(images) // OTHERS)][:OTHERS]
    more = [gate.resized(image, (rows * p, columns * p)) for rows, columns in others for image in some]
    return images[: IMAGES * 4 // 5 - len(more)] + more  # a fifth of the most was held out


# ---- the check


@torch.inference_mode()
def compare(model: ViT, file: Path, pictures: Sequence[Image.Image], metadata: Metadata) -> list[dict[str, Any]]:
    """Run the page's graph and the model on pictures at three sizes: the slider's ends, and the model's own.

    The model gets them from its own transform. At the slider's other steps one picture's pixels are compared.

    Returns:
        Rows as `gate.compare` gives them, the worst of all pictures.

    Raises:
        ParityError: pixels that differ by more than `LEVELS`; of int8, another label where the model is sure.
    """
    session, p, rows = OnnxRuntime(file, torch.get_num_threads()), model.config.patch_size, []
    for grid in grids(model):
        whole = grid in checked_grids(model)
        size, cover = (grid[0] * p, grid[1] * p), cover_of(model, grid)
        some = pictures if whole else pictures[:1]
        answers = [[run(session, one, grid, cover), reference(model, one, size)] for one in some]
        found, wanted = ({name: torch.cat([one[name] for one in side]) for name in side[0]} for side in zip(*answers))
        name = f"{len(some)} picture{'s' * (len(some) > 1)} at {size[0]} x {size[1]}"
        if (most := (found.pop("pixels") - wanted["pixels"]).abs().max().item()) > LEVELS:
            raise gate.ParityError(
                f"on {name} the page's pixels differ from Pillow's by {most:.0f}: nothing was written"
            )
        for output in found if whole else ():
            ours, theirs = (gate.centred(output, one[output]) for one in (found, wanted))
            measured = gate.measure(ours, theirs, metadata.precision, mean=False, resized=True)
            if measured["measure"] == "cosine" and output in ("attention", "patches"):
                measured["bar"] = MAPS
            elif measured["measure"] == "cosine" and grid != own_grid(model):
                measured["bar"] = ENDS
            rows.append({"input": name, "output": output} | measured)
        if whole and "logits" in found and metadata.precision == "int8":
            gate.check_labels(name, found["logits"], wanted["logits"])
    return rows


def run(session: OnnxRuntime, picture: Image.Image, grid: Grid, cover: tuple[int, int]) -> dict[str, Tensor]:
    """What the page's graph gives for a picture at a target of (rows, columns) patches, cut out of `cover` pixels."""
    pixels = np.asarray(to_mode(picture, 3))[None]  # [1, H, W, 3]
    arrays = session.run(pixels, *(np.zeros(shape, dtype=np.uint8) for shape in (grid, cover)))
    return {port.name: torch.from_numpy(array).float() for port, array in zip(session.outputs, arrays)}


def reference(model: ViT, picture: Image.Image, size: tuple[int, int]) -> dict[str, Tensor]:
    """The same by the model's public functions and its own preprocessing."""
    transform, n = create_transform(model, size), model.config.num_prefix_tokens
    images = transform(picture)[None]
    tokens, answer = model.forward_features(images), model(images)
    maps = attention_maps(model, images)[0][:, :, 0, n:]  # [1, A, N]
    return {
        "logits": answer,
        "features": answer,  # of a model without a head
        "patches": tokens[:, n:],
        "attention": maps.unflatten(2, model.grid_of(images)),
        "pixels": torch.from_numpy(np.array(transform.view(picture)).reshape(1, *size, -1)).float(),
    }


def photographs() -> list[Image.Image]:
    """A wide picture and a high one."""
    found = []
    for name, turn in (("coffee", 0), ("rocket", 90)):
        with Image.open(DATA / "photographs" / f"{name}.jpg") as photograph:
            found.append(photograph.convert("RGB").rotate(turn, expand=True))
    return found


def picture_of(model: ViT, image: Tensor) -> Image.Image:
    """The picture [H, W, 3] of which a normalised image [C, H, W] was made."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.preprocessing.mean, model.preprocessing.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.expand(-1, -1, 3).numpy())


# ---- the folder


def check_folder(path: Path, force: bool) -> None:
    """An error if a folder cannot be written, or holds what is not ours to replace."""
    check_place(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file: expected the name of a folder to write")
    found = {file.name for file in path.iterdir()}
    if not found:
        return
    if not is_ours(path / FACTS) or found - FILES:
        other = min(found - FILES, default=FACTS)
        raise FileExistsError(f"{path} holds {other}, which vit export did not write: give another folder")
    if not force:
        raise FileExistsError(f"{path} exists: force=True (--force) replaces it, after the check")


def is_ours(file: Path) -> bool:
    """Whether `vit export` wrote this model.json."""
    try:
        return KEY in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its name when the block succeeds and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        yield folder
        replace_folder(folder, path)
