"""Damaged, malicious and odd files by the thousand, and properties that must hold for all inputs."""

import json
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fuzz
import pytest
import torch
from fuzz_files import KINDS, bases, make_case
from helpers import randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import check
from torch import Tensor

import vit
from vit.config import GELUS
from vit.position import RULES
from vit.weights import LAYOUTS, CheckpointError, convert, detect_layout, load_pretrained, save_checkpoint
from vit.weights.checkpoint import Checkpoint
from vit.weights.formats import READERS, read_checkpoint
from vit.weights.formats.npz import read_npz, write_npz
from vit.weights.formats.safetensors import read_safetensors, write_safetensors
from vit.weights.keymap import SAME
from vit.weights.layouts import google
from vit.weights.load import find, load
from vit.weights.verify import convert_file

CASES = 1_200  # .ci/run runs 20,000, and `python tests/fuzz/fuzz.py` any number
often = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def test_damaged_files_are_refused_or_loaded_to_the_bit(capsys):
    tally, stopped = fuzz.fuzz(seed=0, numbers=range(CASES), jobs=2)
    with capsys.disabled():
        print(f"\n{tally.table()}")
    assert not tally.failures, fuzz.describe(tally, 0, KINDS)
    assert tally.cases == stopped == CASES
    counts = Counter()
    for (kind, _, outcome), count in tally.outcomes.items():
        counts[kind, outcome] += count
    assert all(counts[kind, outcome] > 20 for kind in KINDS for outcome in ("refused", "loaded"))


# --- the fuzzer sees broken readers


def _memory_mapped(path: Path) -> Checkpoint:
    from safetensors.torch import load_file

    return Checkpoint(path, load_file(path), {}, "0" * 64)


def _unpickled(path: Path) -> Checkpoint:
    content = torch.load(path, weights_only=False)
    return Checkpoint(path, {f"model.{name}": tensor for name, tensor in content["model"].items()}, {}, "0" * 64)


def _by_numpy(path: Path) -> Checkpoint:
    import numpy as np

    arrays = np.load(path, allow_pickle=True)
    return Checkpoint(path, {name: torch.from_numpy(arrays[name]) for name in arrays.files}, {}, "0" * 64)


def _by_place(path: Path) -> Checkpoint:
    """As if the header listed the tensors in the order of the data."""
    right = read_safetensors(path)
    names = list(json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}"))
    names = [name for name in names if name != "__metadata__"]
    return replace(right, tensors=dict(zip(names, right.tensors.values())))


class _InPlace:
    """Writes the target itself, instead of a file beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        self.path.write_bytes(b"")
        return self.path

    def __exit__(self, *_: object) -> None:
        pass


# What replaces a reader or a function, the kind of file, and what the fuzzer then reports.
BROKEN = {
    "no seal": ("formats.safetensors", "_SEAL", "other", "safetensors", "expected: refused"),
    "no check of values": ("reading", "_check_values", lambda tensors: None, "safetensors", "expected: refused"),
    "no sha256": ("load", "read", lambda found, sha256: read_checkpoint(found.weights), "npz", "its sha256 is another"),
    "written in place": ("save", "replacing", _InPlace, "safetensors", "a conversion that failed changed"),
    "a memory map": (READERS, ".safetensors", _memory_mapped, "config", "differs from what the file says"),
    "tensors by place": (READERS, ".safetensors", _by_place, "safetensors", "reordered: refused, expected: loads"),
    "objects are unpickled": (READERS, ".npz", _by_numpy, "npz", "code in the file was run"),
    "code is run": (READERS, ".pth", _unpickled, "pth", "code in the file was run"),
}


SLOW = ("no sha256", "objects are unpickled", "written in place", "code is run")


@pytest.mark.parametrize(
    "broken", [pytest.param(BROKEN[name], id=name, marks=[pytest.mark.matrix] * (name in SLOW)) for name in BROKEN]
)
def test_the_fuzzer_sees_a_broken_reader(tmp_path, monkeypatch, broken):
    where, name, other, kind, what = broken
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case").mkdir()
    numbers = list(range(0, 10_000, fuzz.CONVERTED) if where == "save" else range(200))
    sound = fuzz.run_cases(0, numbers, (kind,), tmp_path / "case")
    assert not any(re.search(what, text) for _, text in sound.failures)
    if where is READERS:
        monkeypatch.setitem(READERS, name, other)
    else:
        monkeypatch.setattr(sys.modules[f"vit.weights.{where}"], name, other)
    tally = fuzz.run_cases(0, numbers, (kind,), tmp_path / "case")
    assert any(re.search(what, text) for _, text in tally.failures), tally.failures[:3]


def test_a_worker_that_dies_or_hangs_is_noticed(tmp_path):
    """One case kills its process; the others are run by a new one."""
    worker = fuzz.Worker(0, ("config",), str(tmp_path))
    worker.give([0, 1, 2])
    while worker.current.value < 0:
        assert worker.poll() is None
    os.kill(worker.process.pid, signal.SIGSEGV)
    worker.process.join()
    result = worker.poll()
    while isinstance(result, fuzz.Tally):  # it had already finished
        result = worker.poll()
    assert result == "the process crashed, exit code -11"
    worker.end()


def test_cases_are_functions_of_their_numbers():
    first = [make_case(5, number) for number in range(300)]
    again = [make_case(5, number) for number in reversed(range(300))][::-1]
    assert [case.files for case in first] == [case.files for case in again]
    assert len({case.mutation for case in first}) > 30 and {case.base.kind for case in first} == set(KINDS)


# --- properties


@st.composite
def configs(draw: st.DrawFn) -> vit.ViTConfig:
    """Small models with any values in their config."""
    patch, heads = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    dist, fc_norm = draw(st.booleans()), draw(st.booleans())
    pools = ["token", "avg"] + ["token_avg"] * (not fc_norm) + ["dist"] * (dist and not fc_norm)
    return vit.ViTConfig(
        img_size=(patch * draw(st.integers(1, 4)), patch * draw(st.integers(1, 4))),
        patch_size=patch,
        in_chans=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(0, 4)),
        global_pool=draw(st.sampled_from(pools)),
        embed_dim=heads * 4 * draw(st.integers(1, 2)),
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_ratio=draw(st.sampled_from([0.5, 1.0, 4.0])),
        init_values=draw(st.none() | st.just(0.5)),
        fc_norm=fc_norm,
        dist_token=dist,
        reg_tokens=draw(st.integers(0, 2)),
        class_position=draw(st.booleans()),
        eps=draw(st.floats(1e-12, 1e-2)),
        gelu=draw(st.sampled_from(GELUS)),
        position_rule=draw(st.sampled_from(sorted(RULES))),
        drop_path_rate=draw(st.floats(0, 0.9)),
        grad_checkpointing=draw(st.booleans()),
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits are equal."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name in a
    )


@often
@given(config=configs(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_any_model_is_saved_and_loaded(tmp_path_factory, config, dtype):
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    model = randomize(vit.ViT(config)).to(dtype)
    save_checkpoint(model, path)
    again = load_pretrained(path)
    assert again.config == config and same(again.state_dict(), model.state_dict())


@often
@given(config=configs(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_any_model_goes_there_and_back_or_is_refused_by_name(config, layout):
    state = randomize(vit.ViT(config)).state_dict()
    try:
        there = convert(state, "vit", layout, config)
    except CheckpointError as error:
        assert f"the {layout} layout cannot hold " in str(error)
        return
    back = convert(there.state_dict, layout, "vit", there.config)
    if there.config.class_position == config.class_position:
        assert back.config == config and same(back.state_dict, state)
    else:  # positions were added to the tokens, which cannot be undone, or zeros were written
        assert there.report.notes and back.config == there.config


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
printable = st.text(st.characters(categories=["L", "N", "P"], exclude_characters="\\"), min_size=1, max_size=20)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any small shape."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    bits = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        bits = bytes(bit & 1 for bit in bits)
    return torch.frombuffer(bytearray(bits), dtype=torch.uint8).view(dtype).reshape(shape)


@often
@given(content=st.dictionaries(names, tensors(), max_size=5), metadata=st.dictionaries(names, st.text('a"\\é😀\n')))
def test_what_is_written_as_safetensors_is_read(tmp_path_factory, content, metadata):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.unlink(missing_ok=True)
    write_safetensors(path, content, metadata)
    found = read_safetensors(path)
    assert same(found.tensors, content) and found.metadata == metadata


@often
@given(content=st.dictionaries(printable, tensors(), min_size=1, max_size=5))
def test_what_is_written_as_npz_is_read(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.npz"
    write_npz(path, content)
    assert same(read_npz(path).tensors, content)


_keys = st.sampled_from(
    ["model_type", "architecture", "model_args", "pretrained_cfg", "num_classes", "num_features", "global_pool",
     "label_names", "label_descriptions", "input_size", "mean", "std", "crop_pct", "license", "hidden_size",
     "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps", "hidden_act",
     "intermediate_size", "id2label", "mlp_ratio", "depth", "img_size", "act_layer", "size", "crop_size", "resample"]
)  # fmt: skip
_known = st.sampled_from(["vit", "deit", "dinov2", "vit_small_patch16_224", "gelu", "token", "bicubic"])
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 20) | st.floats() | st.text(max_size=5) | _known,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys | st.text(max_size=3), inner, max_size=6),
    max_leaves=12,
)


@settings(often, max_examples=300)
@given(
    content=st.dictionaries(_keys, _values) | _values,
    kind=st.sampled_from(
        [{}, {"model_type": "vit"}, {"model_type": "dinov2"}, {"architecture": "vit_tiny_patch16_224"}]
    ),
    preprocessor=st.none() | _values,
)
def test_any_config_is_refused_or_understood(tmp_path_factory, content, kind, preprocessor):
    folder = tmp_path_factory.getbasetemp() / "any-config"
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    base = next(base for base in bases() if base.name == "timm's")
    (folder / "model.safetensors").write_bytes(base.files["model.safetensors"])
    (folder / "config.json").write_text(json.dumps(content | kind if isinstance(content, dict) else content))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    try:
        model = load_pretrained(folder, num_heads=2)
    except CheckpointError as error:
        assert str(folder) in str(error) and str(error).isprintable()
    else:
        assert same(
            model.state_dict(), {n: torch.from_numpy(a) for n, a in fuzz.in_our_names(base, base.state).items()}
        )


_parts = st.sampled_from(
    [*{part for layout in LAYOUTS.values() for e in layout.entries for key in e.theirs for part in key.split(".")},
     *{marker for layout in LAYOUTS.values() for marker in layout.detection.markers},
     "model", "module", "teacher", "0", "x", ""]
)  # fmt: skip


@settings(often, max_examples=300)
@given(st.lists(st.lists(_parts | st.text(max_size=3), max_size=5).map(".".join) | st.text(), max_size=20))
def test_any_keys_are_some_layouts_or_refused(keys):
    try:
        assert detect_layout(keys) in LAYOUTS
    except CheckpointError as error:
        assert str(error).isprintable()


# --- what shapes cannot show


@pytest.mark.filterwarnings("ignore:.*cannot hold")
@pytest.mark.parametrize(
    ("layout", "file", "wrong"),
    [
        ("augreg", "w.npz", lambda parts, heads: parts[0].flatten(0, 1).contiguous()),
        ("transformers", "folder", lambda parts, heads: parts[0].T.contiguous()),
    ],
)
def test_a_square_weight_that_a_table_turns_wrongly_is_caught_by_check(tmp_path, monkeypatch, layout, file, wrong):
    """A broken table reads back what it wrote; only running the source in its own library shows the error."""
    config = vit.ViTConfig(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=5)
    model = randomize(vit.ViT(config.override(gelu="tanh" if layout == "augreg" else "erf"))).eval()
    source = tmp_path / file
    save_checkpoint(model, source, layout)
    right = load_pretrained(source)
    turned = replace(google.OUT if layout == "augreg" else SAME, to_ours=wrong)
    entries = [replace(entry, transform=turned) if entry.ours == "blocks.{}.attention.proj.weight" else entry
               for entry in LAYOUTS[layout].entries]  # fmt: skip
    monkeypatch.setitem(LAYOUTS, layout, replace(LAYOUTS[layout], entries=tuple(entries)))
    target = tmp_path / "new" / "out.safetensors"
    convert_file(source, target, "vit")  # which reads back what it wrote
    with pytest.raises(CheckpointError, match="source in .* against source in vit: the largest difference is"):
        check(load(find(source)), load(find(target)))
    name = "blocks.1.attention.proj.weight"
    assert torch.equal(load_pretrained(target).state_dict()[name], right.state_dict()[name].T)
    monkeypatch.undo()
    convert_file(source, target, "vit")
    check(load(find(source)), load(find(target)))
    assert same(load_pretrained(target).state_dict(), right.state_dict())
