"""Files that are not what their names say: one line says what they are, and what to do."""

import gzip
import io
import json
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize
from safetensors.torch import save
from torch import nn

import vit
from vit.weights import CheckpointError
from vit.weights.formats import READERS, read_checkpoint

ENDINGS = (".pth", ".bin", ".pt", ".ckpt", ".pth.tar", ".safetensors", ".npz", ".onnx", ".index.json")
STATE = {"norm.weight": torch.arange(4.0)}


def written(write, *args, **more) -> bytes:
    file = io.BytesIO()
    write(*args, file, **more) if write is torch.save else write(file, *args, **more)
    return file.getvalue()


def archived(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model.pth", TORCH)
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            member = tarfile.TarInfo("model.pth")
            member.size = len(TORCH)
            archive.addfile(member, io.BytesIO(TORCH))
    return file.getvalue()


def graph() -> bytes:
    onnx = pytest.importorskip("onnx")
    constant = onnx.numpy_helper.from_array(np.ones(3, np.float32), "norm.weight")
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [constant])).SerializeToString()


TORCH, LEGACY = written(torch.save, STATE), written(torch.save, STATE, _use_new_zipfile_serialization=False)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 88202656\n"
CONTENTS = {
    "OpenVINO": (
        b'<?xml version="1.0"?>\n<net name="main_graph">',
        "is a graph of OpenVINO's: name the checkpoint that",
    ),
    "LFS": (POINTER, "is a Git LFS pointer: run `git lfs pull`"),
    "annex": (b"/annex/objects/SHA256E-s88--ab.pth\n", "is a git-annex pointer: run `git annex get`"),
    "old annex": (b"../.git/annex/objects/x1/y2/SHA256E-s88--ab.pth", "is a git-annex pointer: run `git annex get`"),
    "page": (b"\n<!DOCTYPE html>\n<html>404", "is a web page .HTML.: download the file itself"),
    "storage": (b"\xef\xbb\xbf<?xml version='1.0'?><Error>", "is an XML or HTML text: download the file itself"),
    "empty": (b"", "is empty: copy or download it again"),
    "preallocated": (bytes(4096), "begins with zeros: its download did not finish"),
    "gzip": (gzip.compress(TORCH), "is a gzip archive: unpack it"),
    "zip": (archived("zip"), "is a zip archive of 'model.pth': unpack it"),
    "tar": (archived("tar"), "is a tar archive: unpack it.*; if torch before 0.1.10"),
    "text": (b"Entry not found", "is a text that begins with 'Entry not found': download or copy"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file, as Keras and TensorFlow write: save the weights as"),
    "TensorFlow": (b"\0\x01\x02" * 9 + b"W\xfb\x80\x8b$uG\xdb", "a part of a TensorFlow checkpoint"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(9), "is a GGUF file"),
    "npy": (written(np.save, np.ones(3)), r"is a single NumPy array \(.npy\): save all"),
    "pickle": (
        pickle.dumps(STATE),
        "is a plain pickle, as pickle.dump writes: load it .* with torch.save or safetensors",
    ),
    "pickle 2": (pickle.dumps(STATE, 2), "is a plain pickle"),
    "pickled arrays": (pickle.dumps({"norm.weight": np.ones(4)}, 5), "is a plain pickle"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(9), "is a picture"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", CONTENTS)
def test_what_it_really_is(content: str, ending: str, tmp_path: Path) -> None:
    data, message = CONTENTS[content]
    path = tmp_path / f"model{ending}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        vit.load_pretrained(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


RIGHT = {
    ".pth": TORCH, ".ckpt": LEGACY, ".safetensors": save(STATE), ".npz": written(np.savez, a=np.ones(3)),
    ".onnx": graph(), ".json": json.dumps({"a": 1}).encode(),
}  # fmt: skip
WHAT = {
    ".pth": "a file of torch.save: rename it to end in .pth", ".ckpt": "a file of torch.save: rename it to end in .pth",
    ".safetensors": "a safetensors file: rename it to end in .safetensors",
    ".npz": "an .npz file: rename it to end in .npz", ".onnx": "an ONNX file: rename it to end in .onnx",
    ".json": "a JSON text: rename it to end in .json",
}  # fmt: skip


@pytest.mark.parametrize("ending", [*RIGHT, ".weights"])
def test_a_format_under_anothers_name(ending: str, tmp_path: Path) -> None:
    reader = "torch" if ending in (".pth", ".ckpt") else ending
    for right, data in RIGHT.items():
        path = tmp_path / (f"m.index{ending}" if ending == ".json" else f"m{ending}")
        path.write_bytes(data)
        if reader == ("torch" if right in (".pth", ".ckpt") else right):
            if ending != ".json":
                assert read_checkpoint(path).tensors
            continue
        with pytest.raises(CheckpointError, match=WHAT[right]):
            read_checkpoint(path)


def test_configs(tmp_path: Path) -> None:
    vit.save_checkpoint(randomize(vit.create_model("vit_digits_patch4_32", depth=1)), tmp_path, layout="timm")
    for name in ("LFS", "page", "gzip", "empty"):
        data, message = CONTENTS[name]
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(CheckpointError, match=f"config.json {message}"):
            vit.load_pretrained(tmp_path)


def test_a_shard_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": {"norm.weight": "model-1.safetensors"}}))
    (tmp_path / "model-1.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="model-1.safetensors is a Git LFS pointer"):
        vit.load_pretrained(tmp_path / "m.index.json")


def test_programs_and_cut_files(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript program, .* save model.state_dict\(\)"):
        vit.load_pretrained(tmp_path / "a.pt")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "b.pt2")
    (tmp_path / "b.pt2").rename(tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="is a program of torch.export: save model.state_dict"):
        vit.load_pretrained(tmp_path / "b.pt")
    for ending, data in RIGHT.items():
        if ending in (".onnx", ".json"):  # the one has no length, the other needs no advice
            continue
        for path in (tmp_path / f"c{ending}", tmp_path / f"c{ending}.incomplete"):
            path.write_bytes(data[: len(data) * 2 // 3])
            with pytest.raises(CheckpointError, match=r"get it again|expected \d+|unfinished download: start it again"):
                vit.load_pretrained(path)
    assert ".incomplete" not in READERS


def test_folders_and_links(tmp_path: Path) -> None:
    folder = tmp_path / "model.pth"
    folder.mkdir()
    for file, message in (
        ("a.pth", "holds none of .*; name one of its files: a.pth"),
        ("saved_model.pb", "it is a TensorFlow model"),
        ("data.pkl", "it is an unpacked file of torch.save"),
        (".metadata", "it is a distributed checkpoint: run `python -m torch.distributed.checkpoint.format_utils"),
    ):
        (folder / file).write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=message):
            vit.load_pretrained(folder)
    (tmp_path / "b.pth").symlink_to(".git/annex/objects/b.pth")
    with pytest.raises(FileNotFoundError, match="b.pth is a link to .*, which does not exist; run `git annex get`"):
        vit.load_pretrained(tmp_path / "b.pth")
