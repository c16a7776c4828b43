"""Fixtures that several files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many as there are cores: of the processes that it starts, too
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import timm
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before our Triton kernels are first used

from helpers import randomize
from hub_server import COMMIT, DEFAULT, HubServer


@pytest.fixture(scope="session")
def default_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default checkpoint's stand-in: timm's own files for that name, with random weights in them."""
    folder = tmp_path_factory.mktemp("default")
    with torch.device("meta"):
        model = timm.create_model(DEFAULT)
    model = randomize(model.to_empty(device="cpu"))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(params=["float32", "int8"])
def optimized_dtype(request: pytest.FixtureRequest) -> str:
    """What a model can be optimized to; skipped where this machine cannot compute so."""
    from vit.kernels.cpu.model import missing

    if reason := missing(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def registered() -> Iterator[Callable[..., str]]:
    """Register an attention for one test only; gives back its name."""
    import vit

    vit.attention_names()  # with which the kernels' names come
    before = dict(vit.registry._registry)
    yield lambda name, fn, **more: vit.register_attention(name, fn, overwrite=True, **more) or name
    vit.registry._registry.clear()
    vit.registry._registry.update(before)


@pytest.fixture
def default_hub(default_checkpoint: Path) -> Iterator[HubServer]:
    """A Hub on the loopback that has the stand-in under the default checkpoint's name."""
    content = {name: (default_checkpoint / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with HubServer(f"timm/{DEFAULT}", {COMMIT: content}, {"main": COMMIT}) as server:
        yield server
