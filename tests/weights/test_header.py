"""Our own files' header."""

import json
import struct
from dataclasses import asdict

import pytest
import torch

import vit
from vit.weights import CheckpointError


def header(path, change):
    """Rewrite the header of a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    content = json.loads(data[8 : 8 + length])
    change(content)
    content["__metadata__"].pop("vit.seal", None)  # which would give the change away
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_part(key, change):
    def rewrite(content):
        part = json.loads(content["__metadata__"][key])
        content["__metadata__"][key] = json.dumps(change(part))

    return rewrite


BAD_FILES = {
    "not a complete safetensors file": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "is empty: copy or download it again": lambda path: path.write_bytes(b""),
    "is a file of torch.save: rename it to end in .pth": lambda path: torch.save({"a": torch.ones(3)}, path),
    "not a complete safetensors file:": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "unknown config field 'num_headz'": lambda path: header(
        path, change_part("vit.config", lambda c: c | {"num_headz": 3})
    ),
    "num_heads must be a whole number": lambda path: header(
        path, change_part("vit.config", lambda c: c | {"num_heads": "3"})
    ),
    "depth is declared to be 3, but the weights have 2": lambda path: header(
        path, change_part("vit.config", lambda c: c | {"depth": 3})
    ),
    "vit.config in the file's header cannot be used: dictionary update": lambda path: header(
        path, change_part("vit.config", list)
    ),
    "vit.assumed in the file's header cannot be used: TypeError": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.assumed": '{"eps": 1}'})
    ),
    "vit.config in the file's header cannot be used: Expecting property name": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.config": "{"})
    ),
    "vit.preprocessing in the file's header cannot be used: std must be above 0": lambda path: header(
        path, change_part("vit.preprocessing", lambda c: c | {"std": [0, 1, 1]})
    ),
    "vit.categories in the file's header cannot be used: categories must be a list of strings": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.categories": "[1, 2]"})
    ),
    "vit.preprocessing in the file's header cannot be used: TypeError: .*'a'": lambda path: header(
        path, change_part("vit.preprocessing", lambda c: c | {"a": 1})
    ),
    "vit.attention in the file's header cannot be used: TypeError: .*'new_field'": lambda path: header(
        path,
        lambda c: c["__metadata__"].update(
            {"vit.attention": json.dumps([{"name": "sdpa", "options": {}, "new_field": 1}] * 2)}
        ),
    ),
    "vit.attention in the file's header cannot be used: TypeError": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.attention": '[{"name": "sdpa", "options": 3}]'})
    ),
    "there are 2 categories for 7 classes": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.categories": '["a", "b"]'})
    ),
    "vit.provenance in the file's header cannot be used: provenance must be an object": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.provenance": '{"source": 1}'})
    ),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files(tmp_path, rectangular, message):
    path = vit.save_checkpoint(rectangular, tmp_path / "m.safetensors")
    vit.load_pretrained(path)
    BAD_FILES[message](path)
    with pytest.raises(CheckpointError, match=message) as error:
        vit.load_pretrained(path)
    assert str(path) in str(error.value)


def test_a_guess_does_not_become_a_fact(tmp_path, timm_file):
    """A guess stays marked as one, however often the model is saved and loaded."""
    config = vit.load_pretrained(timm_file, eps=1e-5).config
    assert config.sources["num_heads"] == "the timm layout's default" and config.sources["eps"] == "the caller"
    path = timm_file
    for i in range(2):
        path = vit.save_checkpoint(vit.load_pretrained(path, eps=1e-5), tmp_path / f"{i}.safetensors")
        sources = vit.load_pretrained(path).config.sources
        assert sources["num_heads"] == sources["gelu"] == "the timm layout's default, by way of the file's header"
        assert sources["eps"] == sources["depth"] == "the file's header"
    stated = vit.load_pretrained(path, num_heads=6)
    assert stated.config.sources["num_heads"] == "the caller"
    again = vit.load_pretrained(vit.save_checkpoint(stated, path)).config
    assert again.sources["num_heads"] == "the file's header" and again == stated.config
    header(path, lambda content: content["__metadata__"].pop("vit.assumed"))  # as files were written before
    old = vit.load_pretrained(path).config
    assert old == again and old.sources["gelu"] == "the file's header"


def test_provenance_and_config_are_plain_data(rectangular):
    assert json.loads(json.dumps(asdict(rectangular.config)))["embed_dim"] == 64
    record = vit.Provenance("a", "b", "vit", parent=vit.Provenance("c", "d", "timm"))
    assert vit.Provenance.from_dict(asdict(record)) == record
