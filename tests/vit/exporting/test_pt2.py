""".pt2: PyTorch's own exported program gives what the model gives, and is opened only if it is trusted."""

import json
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
import torch
from exporting_cases import EVERYTHING
from helpers import FLOAT32, difference, images, refused_in_one_line

import vit
from vit.exporting import runtimes, to_pt2
from vit.exporting.graph import Graph, at_size
from vit.exporting.read import read_metadata


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    vit.export(model, path, "pt2", outputs=EVERYTHING)
    return path


@pytest.mark.parametrize("size", [(3, 28, 20), (1, 4, 4), (2, 64, 12)])
def test_it_computes_the_exported_graph_bit_for_bit(size, model, file):
    loaded, x = vit.load_exported(file, trust=True), images(size[0], 3, *size[1:])
    found = loaded.run(x)
    with torch.no_grad():
        for name, wanted in zip(EVERYTHING, Graph(at_size(model, None, torch.float32), EVERYTHING)(x)):
            assert torch.equal(found[name], wanted), name
        assert difference(loaded(x), model(x)) <= FLOAT32


def test_one_size(model, tmp_path):
    vit.export(model, tmp_path / "model.pt2", "pt2", img_size=(20, 28), batch_size=2)
    loaded, x = vit.load_exported(tmp_path / "model.pt2", trust=True), images(3, 3, 20, 28)
    assert loaded.session.inputs == [runtimes.Port("images", "float32", (2, 3, 20, 28))]
    with torch.no_grad():
        assert difference(loaded(x), model(x)) <= FLOAT32


def test_torch_alone_reads_it_with_its_metadata(file):
    extra = {"vit.json": ""}
    program = torch.export.load(file, extra_files=extra)
    assert json.loads(json.loads(extra["vit.json"])["vit.outputs"]) == list(EVERYTHING)
    assert program.module()(images(2, 3, 28, 20))[0].shape == (2, 5)


def test_it_holds_no_pickle_and_no_trace_of_this_machine(file, model, tmp_path):
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    assert entries["archive/data/sample_inputs/model.pt"] == b""
    for content in entries.values():
        assert b"stack_trace" not in content and b"/vit/" not in content and not content.startswith(b"\x80\x02")
    assert sum(b'"use_pickle": true' in content for content in entries.values()) == 0
    vit.export(model, tmp_path / "again.pt2", "pt2", outputs=EVERYTHING)
    assert (tmp_path / "again.pt2").read_bytes() == file.read_bytes()


class Writes:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (eval, (f"open({str(self.path)!r}, 'w').close()",))


def test_it_is_refused_without_trust_since_torch_would_run_what_is_in_it(file, tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "model.pt2"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            bad = name.endswith("sample_inputs/model.pt")
            target.writestr(name, pickle.dumps(Writes(ran)) if bad else source.read(name))
    refused_in_one_line(lambda: vit.load_exported(path), r"can run code .* trust=True \(--trust\)")
    assert vit.exporting.read.read_metadata(path).outputs == EVERYTHING
    assert not ran.exists()
    with suppress(Exception):  # PyTorch's, after it has run
        torch.export.load(path)
    assert ran.exists()  # the control


def test_damaged_files(file, tmp_path):
    content, cut = file.read_bytes(), tmp_path / "cut.pt2"
    for end in (0, 100, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:end])
        refused_in_one_line(lambda: vit.load_exported(cut, trust=True), "cut.pt2 is cut short, damaged")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(cut, "w") as target:
        for name in source.namelist():
            if "models/" not in name:
                target.writestr(name, source.read(name))
    refused_in_one_line(lambda: vit.load_exported(cut, trust=True), r"PyTorch .* cannot open .*, which .* wrote")


@pytest.mark.parametrize("damage", ["deep", "deflated", "encrypted"])
def test_metadata_that_cannot_be_unpacked(damage, tmp_path):
    path, entry = tmp_path / "model.pt2", zipfile.ZipInfo("archive/extra/vit.json")
    entry.compress_type = zipfile.ZIP_DEFLATED if damage == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w") as target:
        target.writestr(entry, "[" * 100_000 if damage == "deep" else json.dumps({"a" * 99: "b" * 99}))
    content = bytearray(path.read_bytes())
    if damage == "deflated":
        start = 30 + len(entry.filename)  # behind the entry's header
        content[start : start + 8] = b"\xff" * 8
    elif damage == "encrypted":
        content[content.index(b"PK\1\2") + 8] |= 1
        content[6] |= 1
    path.write_bytes(content)
    refused_in_one_line(lambda: read_metadata(path), "model.pt2 is cut short, damaged")


def test_other_metadata(file, tmp_path):
    for key, value, message in (
        ("vit.version", None, "has no metadata"),
        ("vit.outputs", '["logits"]', "describe images, logits, and its graph has"),
        ("vit.size", "[28, 20]", "describe images"),
        ("pt2.inputs", None, "metadata cannot be read: 'pt2.inputs'"),
        ("pt2.instructions", "{", "metadata cannot be read"),
        ("pt2.instructions", "5", "metadata cannot be read"),
        ("pt2.inputs", "5", "metadata cannot be read: 'int' object"),
        ("vit.size", "[1]", "metadata vit.size cannot be read"),
        ("vit.categories", "5", "metadata vit.categories cannot be read"),
        ("vit.input", '"bytes"', "unknown kind of input in its metadata 'bytes'"),
    ):
        with zipfile.ZipFile(file) as source, zipfile.ZipFile(tmp_path / "model.pt2", "w") as target:
            for name in source.namelist():
                text = source.read(name)
                if name.endswith("vit.json"):
                    strings = {k: v for k, v in (json.loads(text) | {key: value}).items() if v is not None}
                    text = json.dumps(strings)
                target.writestr(name, text)
        refused_in_one_line(lambda: vit.load_exported(tmp_path / "model.pt2", trust=True), message)


def test_threads_export_in_turns(model, tmp_path):
    paths = [tmp_path / f"{i}.pt2" for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(partial(vit.export, model, img_size=28), paths))
    x, loaded = images(1, 3, 28, 28), [vit.load_exported(path, trust=True) for path in paths]
    assert all(torch.equal(one(x), loaded[0](x)) for one in loaded)


def test_threads_are_pytorchs(file):
    wrong = torch.get_num_threads() + 1
    refused_in_one_line(lambda: vit.load_exported(file, threads=wrong, trust=True), "torch.set_num_threads")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "pt2", "int8": True}, r"--int8 \(int8=True\) with pt2: .* formats that take it: onnx, openvino"),
        ({"format": "pt2", "half": True}, "--half"),
        ({"format": "pt2", "opset": 20}, r"--opset \(opset=20\) with pt2"),
        ({"format": "onnx", "aot": True}, r"--aot \(aot=True\) with onnx: .* formats that take it: pt2"),
    ],
)
def test_options_that_a_format_does_not_take(arguments, message, model, tmp_path):
    path = tmp_path / f"model.{arguments['format']}"
    refused_in_one_line(lambda: vit.export(model, path, **arguments), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_native_code(model, tmp_path, monkeypatch):
    vit.export(model, tmp_path / "model.pt2", "pt2", img_size=(28, 20), aot=True, outputs=EVERYTHING)
    refused_in_one_line(lambda: vit.load_exported(tmp_path / "model.pt2"), "can run code")
    loaded, x = vit.load_exported(tmp_path / "model.pt2", trust=True), images(2, 3, 28, 20)
    with torch.no_grad():
        assert difference(loaded(x), model(x)) <= FLOAT32
    fewer = [name for name in to_pt2.instructions() if name not in ("avx2", "neon")]
    monkeypatch.setattr(runtimes, "instructions", lambda: fewer)
    refused_in_one_line(
        lambda: vit.load_exported(tmp_path / "model.pt2", trust=True),
        r"for a processor with (avx2|neon), wh",
    )


def test_without_a_compiler_native_code_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-compiler",))
    refused_in_one_line(
        lambda: vit.export(model, tmp_path / "model.pt2", "pt2", img_size=8, aot=True), "AOTInductor cannot compile"
    )
