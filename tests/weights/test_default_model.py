"""The main use: the default model by its name, downloaded, loaded, run."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import difference
from hub_server import COMMIT, DEFAULT
from PIL import Image
from safetensors.torch import load_file
from skimage.data import astronaut

import vit
from vit.weights import HubError

CLI = Path(sys.executable).with_name("vit")
CODE = """
import json, sys, torch, vit
from dataclasses import asdict
found = []
for name, keywords in json.loads(sys.argv[1]):
    model = vit.load_pretrained(name, **keywords)
    found.append({"provenance": asdict(model.provenance), "categories": len(model.categories)})
with torch.inference_mode():
    logits = model(vit.create_transform(model)(vit.load_image("photo.png"))[None])
torch.save(logits, "logits.pt")
print(json.dumps(found))
"""


@pytest.fixture
def start(default_hub, tmp_path):
    """Run a command in a folder with a photograph, with the Hub of the test and an empty cache."""
    Image.fromarray(astronaut()).save(tmp_path / "photo.png")
    env = os.environ | {"HF_ENDPOINT": default_hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"),
                        "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}  # fmt: skip

    def start(*command: object, **more: str) -> subprocess.CompletedProcess:
        command = tuple(map(str, command))
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env | more, timeout=120)

    return start


def load_all(start, *calls):
    """What a new process loads by these names and keywords."""
    done = start(sys.executable, "-c", CODE, json.dumps(calls))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def load(start, name, **keywords):
    return load_all(start, (name, keywords))[0]


def test_by_name_and_equal_to_timm(start, default_hub, default_checkpoint, tmp_path):
    import timm

    facts = load(start, DEFAULT)
    assert facts["provenance"] == {
        "source": f"hf-hub:timm/{DEFAULT}",
        "sha256": hashlib.sha256((default_checkpoint / "model.safetensors").read_bytes()).hexdigest(),
        "layout": "timm",
        "commit": COMMIT,
        "license": "apache-2.0",
        "parent": None,
        "part": None,
        "recipe": None,
    }
    assert facts["categories"] == 1000
    twin = timm.create_model(DEFAULT).eval()
    twin.load_state_dict(load_file(default_checkpoint / "model.safetensors"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(twin), is_training=False)
    with torch.inference_mode():
        expected = twin(transform(Image.fromarray(astronaut()))[None])
    assert difference(torch.load(tmp_path / "logits.pt"), expected) <= 1e-5

    downloads = len(default_hub.downloads("model.safetensors"))
    assert downloads == 1
    others = (DEFAULT.split(".")[0], f"hf-hub:timm/{DEFAULT}", f"hf-hub:timm/{DEFAULT}@{COMMIT}")
    for found in load_all(start, *((other, {}) for other in others), (DEFAULT, {"revision": "main"})):
        assert found["provenance"]["commit"] == COMMIT
    assert len(default_hub.downloads("model.safetensors")) == downloads  # from the cache

    default_hub.stop()
    done = start(CLI, "predict", "photo.png", "--json", "-k", "3", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["predictions"]
    assert answers[0]["class"] in expected[0].topk(5).indices.tolist() and answers[0]["synset"].startswith("n")


def test_a_config_without_a_license_in_it(start, default_hub, default_checkpoint):
    content = json.loads((default_checkpoint / "config.json").read_text())
    del content["pretrained_cfg"]["license"]
    default_hub.commits[COMMIT]["config.json"] = json.dumps(content).encode()
    assert load(start, DEFAULT)["provenance"]["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "command", [*(pytest.param(name, marks=pytest.mark.matrix) for name in ("predict", "inspect")), "convert"]
)
def test_a_damaged_download_is_refused(start, default_hub, default_checkpoint, command, tmp_path):
    content = bytearray((default_checkpoint / "model.safetensors").read_bytes())
    content[-100] ^= 1  # still a checkpoint, but not the one that was promised
    default_hub.instead["model.safetensors"] = bytes(content)
    arguments = {
        "predict": ["photo.png"],
        "inspect": [DEFAULT],
        "convert": [DEFAULT, "out.safetensors", "--to", "vit"],
    }[command]
    done = start(CLI, command, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "but the Hub says" in done.stderr and "delete it" in done.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_a_repository_that_is_no_vit(start, default_hub):
    default_hub.commits[COMMIT]["config.json"] = b'{"architecture": "resnet50", "pretrained_cfg": {}}'
    done = start(CLI, "inspect", DEFAULT)
    assert done.returncode == 2 and "the architecture 'resnet50' is not one of" in done.stderr


@pytest.mark.hub
def test_the_real_file_from_the_real_hub():
    """22,050,664 trained parameters, which recognize a space suit; needs a network."""
    try:
        model = vit.load_pretrained(DEFAULT)
    except HubError as error:
        pytest.skip(f"no Hub: {error}")
    assert sum(p.numel() for p in model.parameters()) == 22_050_664
    with torch.inference_mode():
        logits = model(vit.create_transform(model)(Image.fromarray(astronaut()))[None])[0]
    names = [model.categories[i] for i in logits.topk(5).indices.tolist()]
    assert any("suit" in name or "shuttle" in name or "military" in name for name in names), names
