"""PyTorch's files: read bit for bit; files with wrong claims are refused before they do harm."""

import argparse
import enum
import functools
import hashlib
import io
import os
import pickle
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.serialization
from damaged import Touch, damaged, patched, refused, rezipped, same, survives, taking_less_than, values
from torch import Tensor, nn

import vit
from vit.weights.checkpoint import CheckpointError
from vit.weights.formats.npz import read_npz, write_npz
from vit.weights.formats.pickled import read_pickled
from vit.weights.formats.unpickler import OPCODES


@pytest.mark.parametrize("format", ["npz", "pickled"])
def test_files_that_change_meanwhile_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    path = tmp_path / "a"
    save(path, values())
    if format == "npz":
        write_npz(path, values())

    def change(file: Any) -> str:
        os.utime(path, (1, 1))
        return ""

    monkeypatch.setattr(f"vit.weights.formats.{format}.file_sha256", change)
    refused(read_npz if format == "npz" else read_pickled, path, match="changed while it was read")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    for read in (read_npz, read_pickled):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


NEW_AND_OLD = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def save(path: Path, content: Any, new: bool = True) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=new)


@NEW_AND_OLD
def test_state_dicts_are_read_bit_for_bit(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "weights.pth"
    expected = values()
    if not new:
        del expected["key"]  # torch.save cannot write uint32 in the old format
    save(path, expected, new)
    checkpoint = read_pickled(path)
    assert same(checkpoint.tensors, expected)
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.path == path
    assert not checkpoint.metadata and not checkpoint.others
    with torch.device("meta"):
        assert same(read_pickled(path).tensors, expected)


@NEW_AND_OLD
def test_training_checkpoints_are_flattened(tmp_path: Path, new: bool) -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(lr=0.1, betas=[0.9, 0.95], output_dir="out", nested={"a": None})
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": args,
        "epoch": 3,
        "sizes": torch.Size((3, 4)),
        "device": torch.device("cpu"),
        "queue": [torch.ones(2), (torch.zeros(2), "x")],
        "losses": [0.1, [0.2, {"epoch": 3}]],
        5: torch.tensor(5.0),
    }
    save(tmp_path / "a.pth", content, new)
    checkpoint = read_pickled(tmp_path / "a.pth")
    moments = optimizer.state_dict()["state"]
    expected = {
        "model.weight": model.weight.detach(),
        "model.bias": model.bias.detach(),
        **{f"optimizer.state.{i}.{key}": moments[i][key] for i in moments for key in ("step", "exp_avg", "exp_avg_sq")},
        "queue.0": torch.ones(2),
        "queue.1.0": torch.zeros(2),
        "5": torch.tensor(5.0),
    }  # fmt: skip
    assert same(checkpoint.tensors, expected)
    others = {name: kind for name, kind in checkpoint.others.items() if not name.startswith("optimizer.")}
    assert others == {"args": "Namespace", "epoch": "int", "device": "device", "queue.1.1": "str",
                      "sizes": "tuple", "losses": "list"}  # fmt: skip
    assert checkpoint.others["optimizer.param_groups"] == "list"


@NEW_AND_OLD
def test_what_callers_told_torch_about_mapping_does_not_matter(tmp_path: Path, new: bool) -> None:
    save(tmp_path / "a.pth", {"w": torch.ones(2)}, new)
    with torch.utils.serialization.config.patch({"load.mmap": True}):
        assert same(read_pickled(tmp_path / "a.pth").tensors, {"w": torch.ones(2)})


@NEW_AND_OLD
def test_parameters_views_and_ties(tmp_path: Path, new: bool) -> None:
    flat = torch.arange(100.0)
    tied = nn.Parameter(torch.ones(2, 3))
    content = {"a": flat[:10], "b": flat[10:22].view(3, 4).T, "tied": tied, "again": tied, "t": torch.ones(2, 3).T}
    save(tmp_path / "a.pth", content, new)
    tensors = read_pickled(tmp_path / "a.pth").tensors
    assert same(tensors, {name: tensor.detach().contiguous() for name, tensor in content.items()})
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in tensors.values())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())
    assert tensors["tied"].data_ptr() == tensors["again"].data_ptr()


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    try:
        torch.serialization.set_crc32_options(False)
        save(tmp_path / "a.pth", values())
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_pickled(tmp_path / "a.pth").tensors, values())


@NEW_AND_OLD
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            nn.Linear(2, 2),
            r"holds Linear, expected a dictionary of tensors: save model.state_dict\(\)",
        ),
        ({"w": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"w": torch.empty(3, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"w": torch.ones(3, dtype=torch.complex64).conj()}, "a.pth"),
        ({"w": torch.ones(0, 3)}, r"holds no dense tensors, but w \(a tensor without values\): save model.state"),
        ({"a": {"b": 1}}, r"holds no dense tensors, but a.b \(int\)"),
        ({}, "holds no dense tensors, but nothing"),
        (torch.ones(3), "holds Tensor, expected a dictionary"),
        ([torch.ones(3)], "holds list, expected a dictionary"),
        ({"a.b": torch.ones(2), "a": {"b": torch.ones(3)}}, "two values named 'a.b'"),
        ({"a": {"b": torch.ones(3)}, "a.b": 1}, "two values named 'a.b'"),
        ({"a.b": 1, "a": {"b": torch.ones(3)}}, "two values named 'a.b'"),
        ({"a": {"b": torch.ones(3)}, "a.b": [1]}, "two values named 'a.b'"),
        ({"1": torch.ones(2), 1: torch.ones(3)}, "two values named '1'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the tensors within w")
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, match: str, new: bool) -> None:
    save(tmp_path / "a.pth", content, new)
    refused(read_pickled, tmp_path / "a.pth", match=match)


def test_torchscript_programs_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pth")
    refused(read_pickled, tmp_path / "a.pth", match=r"TorchScript program, .* save model.state_dict\(\)")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values: Any) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def name(path: str) -> bytes:
    module, _, last = path.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def storage(kind: str = "torch.FloatStorage", key: str = "0", count: int = 6, more: bytes = b"") -> bytes:
    return b"(" + text("storage") + name(kind) + text(key) + text("cpu") + integer(count) + more + b"tQ"


def tensor(
    memory: bytes = storage(), offset: int = 0, size: Any = (2, 3), stride: Any = (3, 1), last: bytes = b"",
    function: str = "torch._utils._rebuild_tensor_v2",
) -> bytes:  # fmt: skip
    hooks = name("collections.OrderedDict") + b")R"
    return (
        name(function) + b"(" + memory + integer(offset) + numbers(size) + numbers(stride) + b"\x89" + hooks + last
        + b"tR"
    )  # fmt: skip


def parameter(gradient: bytes = b"\x88", hooks: bytes = b"}") -> bytes:
    return name("torch._utils._rebuild_parameter") + b"(" + tensor() + gradient + hooks + b"tR"


def good(value: bytes | None = None) -> bytes:
    return b"\x80\x02}" + text("w") + (tensor() if value is None else value) + b"s."


FLOATS = torch.arange(6.0).numpy().tobytes()


def pth(data: bytes, **records: bytes) -> bytes:
    """A file of torch.save with this pickle, and further records by name."""
    records = {"version": b"3\n", "byteorder": b"little", "data/0": FLOATS} | records
    return rezipped(("a/data.pkl", data), *((f"a/{key}", value) for key, value in records.items()))


def legacy(data: bytes, keys: Any = ("0",), floats: bytes = struct.pack("<q", 6) + FLOATS) -> bytes:
    """The same in the format before 1.6."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    before = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, info))
    return before + data + pickle.dumps(list(keys), 2) + floats


OLD = storage(more=b"N")


def test_the_pickles_below_are_refused_for_what_they_change(tmp_path: Path) -> None:
    for content in (pth(good()), legacy(good(tensor(OLD)))):
        (tmp_path / "a.pth").write_bytes(content)
        assert same(read_pickled(tmp_path / "a.pth").tensors, {"w": torch.arange(6.0).reshape(2, 3)})
        assert same(torch.load(tmp_path / "a.pth", weights_only=True), {"w": torch.arange(6.0).reshape(2, 3)})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_only_opcodes_that_torch_knows_are_followed() -> None:
    for code in range(256):
        try:
            torch._weights_only_unpickler.load(io.BytesIO(bytes([code]) + bytes(100)))
        except Exception as error:
            unknown = "Unsupported operand" in str(error) and str(code) in str(error)
            assert unknown == (code not in OPCODES) or bytes([code]) == pickle.EMPTY_SET


@NEW_AND_OLD
@pytest.mark.parametrize(
    "call",
    [
        name("os.system") + b"(" + text("touch ran") + b"tR",
        name("posix.system") + b"(" + text("touch ran") + b"tR",
        name("builtins.eval") + b"(" + text("open('ran', 'w')") + b"tR",
        name("builtins.open") + b"(" + text("ran") + text("w") + b"tR",
        name("__builtin__.open") + b"(" + text("ran") + text("w") + b"tR",
        name("torch.hub.load_state_dict_from_url") + b"(" + text("file:ran") + b"tR",
        name("torch.serialization.os.system") + b"(" + text("touch ran") + b"tR",
        name("builtins.getattr") + b"(" + name("collections.OrderedDict") + text("__init__") + b"tR",
        name("builtins.bytearray") + b"(" + integer(10**12) + b"tR",
        name("builtins.set") + b")R",
        name("numpy.zeros") + b"(" + integer(10**12) + b"tR",
        name("torch.zeros") + b"(" + integer(10**12) + b"tR",
        name("torch.Tensor") + b"(" + integer(10**12) + b"tR",
        name("torch._utils._rebuild_wrapper_subclass") + b")R",
        name("torch.nn.parameter.Parameter") + b")\x81",
        b"i" + b"os\nsystem\n",
        text("os") + text("system") + b"\x93",
    ],
)  # fmt: skip
def test_pickles_that_call_out_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: bytes, new: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    reasons = "contains|opcode|no dense tensors|lists memory that its tensors do not use"
    refused(read_pickled, tmp_path / "a.pth", pth(good(call)) if new else legacy(good(call)), reasons)
    assert not (tmp_path / "ran").exists()


@NEW_AND_OLD
def test_reduce_is_not_run(tmp_path: Path, new: bool) -> None:
    save(tmp_path / "a.pth", {"w": torch.ones(2), "x": Touch(tmp_path / "ran")}, new)
    refused(read_pickled, tmp_path / "a.pth", match="contains posix.system, .* not run.: do not trust")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


HUGE = 10**11


LIES = {
    "size": tensor(size=(2, 4)),
    "huge size": tensor(size=(HUGE, 3)),
    "overflow": tensor(size=(2**62, 2**62), stride=(0, 0)),
    "expanded": tensor(size=(HUGE, HUGE), stride=(0, 0)),
    "stride": tensor(stride=(4, 1)),
    "huge stride": tensor(stride=(HUGE, 1)),
    "offset": tensor(offset=1),
    "negative offset": tensor(offset=-1),
    "negative size": tensor(size=(-2, -3)),
    "negative stride": tensor(offset=5, stride=(-3, -1)),
    "lengths": tensor(stride=(3, 1, 1)),
    "65 sides": tensor(size=(1,) * 65, stride=(1,) * 65),
    "many sides": tensor(size=(2**64,) * 20000, stride=(0,) * 20000),
    "fewer bytes": tensor(storage(count=7), size=(7,), stride=(1,)),
    "more bytes": tensor(storage(count=5), size=(5,), stride=(1,)),
    "huge storage": tensor(storage(count=HUGE)),
    "negative storage": tensor(storage(count=-6)),
    "wider dtype": tensor(storage("torch.DoubleStorage")),
    "other record": tensor(storage(key="1")),
    "not a record": tensor(storage(key="../data.pkl")),
    "a key that is a number": tensor(storage().replace(text("0"), integer(0))),
    "a place that is a number": tensor(storage().replace(text("cpu"), integer(0))),
    "a truth for a number": tensor(storage(count=1).replace(integer(1), b"\x88")),
    "another id": tensor(storage().replace(text("storage"), text("module"))),
    "a dtype for a storage": tensor(storage("torch.float32")),
    "gradient": tensor().replace(b"\x89", integer(1)),
    "hooks": tensor().replace(b")R", b"}" + text("x") + b"Ns"),
    "parameter's gradient": parameter(gradient=integer(1)),
    "parameter's hooks": parameter(hooks=b"}" + text("x") + b"Ns"),
    "no storage": tensor(integer(6)),
    "storage class": tensor(name("torch.FloatStorage")),
    "storage made": name("torch.FloatStorage") + b"(" + integer(HUGE) + b"tR",
    "untyped storage made": name("torch.storage.UntypedStorage") + b"(" + integer(HUGE) + b"tR",
    "untyped storage made anew": name("torch.storage.UntypedStorage") + b"(" + integer(HUGE) + b"t\x81",
    "id of another kind": b"(" + text("module") + text("a") + text("b") + text("c") + integer(1) + b"tQ",
    "id of a text": text("storage") + b"Q",
    "v3 size": tensor(size=(7,), stride=(1,), last=name("torch.float32"), function="torch._utils._rebuild_tensor_v3"),
    "v3 dtype": tensor(last=name("torch.float64"), function="torch._utils._rebuild_tensor_v3"),
    "v3 no dtype": tensor(last=name("torch.FloatStorage"), function="torch._utils._rebuild_tensor_v3"),
    "parameter of a number": name("torch._utils._rebuild_parameter") + b"(" + integer(3) + b"\x88NtR",
    "text of 4 GB": b"X\xff\xff\xff\xff",
    "tuple of nothing": b"t",
    "memo of nothing": b"h\x09",
    "append to a tensor": tensor() + integer(1) + b"a",
    "attribute of a tensor": tensor() + b"}" + text("x") + integer(1) + b"sb",
    "attribute of a function": name("collections.OrderedDict") + b"}" + text("x") + integer(1) + b"sb",
    "a function made anew": name("collections.OrderedDict") + b")\x81",
    "an item of a list": b"]Na" + integer(0) + b"Ns",
    "quantized": tensor(last=name("torch.qint8"), function="torch._utils._rebuild_tensor_v3"),
    "arguments of a dictionary": name("collections.OrderedDict") + b"(]tR",
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_are_refused_before_memory_is_taken(tmp_path: Path, lie: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vit.weights.formats.pickled._flatten", lambda *_: pytest.fail("its memory was read"))
        refused(read_pickled, tmp_path / "a.pth", pth(good(lie)))
        old = lie.replace(storage(), OLD)
        for count in (5, 7, 6, -6, HUGE):
            old = old.replace(integer(count) + b"tQ", integer(count) + b"NtQ")
        refused(read_pickled, tmp_path / "a.pth", legacy(good(old)))


def test_right_values_at_their_limits_are_read(tmp_path: Path) -> None:
    v3 = tensor(last=name("torch.float32"), function="torch._utils._rebuild_tensor_v3")
    for value, expected in (
        (tensor(offset=5, size=(1,), stride=(99,)), torch.tensor([5.0])),
        (tensor(offset=3, size=(), stride=()), torch.tensor(3.0)),
        (tensor(size=(2, 3), stride=(0, 2)), torch.tensor([[0.0, 2.0, 4.0]] * 2)),
        (parameter(), torch.arange(6.0).reshape(2, 3)),
        (v3, torch.arange(6.0).reshape(2, 3)),
    ):
        (tmp_path / "a.pth").write_bytes(pth(good(value)))
        assert same(read_pickled(tmp_path / "a.pth").tensors, {"w": expected})


@NEW_AND_OLD
def test_memo_bombs_take_no_memory(tmp_path: Path, new: bool) -> None:
    value = tensor(storage() if new else OLD) + b"r\xff\xff\xff\x7f"
    (tmp_path / "a.pth").write_bytes(pth(good(value)) if new else legacy(good(value)))
    with taking_less_than(4 * 2**20):
        assert same(read_pickled(tmp_path / "a.pth").tensors, {"w": torch.arange(6.0).reshape(2, 3)})


def test_names_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    value = b"}" + text("x") + tensor() + b"s"
    for i in range(40):  # each dictionary holds the one before twice
        value += b"q" + bytes([i])
        value = b"}(" + text("a") + value + text("b") + b"h" + bytes([i]) + b"u"
    refused(read_pickled, path, pth(good(value)), "names of more than")
    refused(read_pickled, path, pth(b"\x80\x02}q\0" + text("x") + b"h\0s."), "names of more than|RecursionError")
    long = b"}(" + b"".join(text(str(i)) + b"N" for i in range(300)) + b"u"
    refused(read_pickled, path, pth(b"\x80\x02}" + text("x" * 60_000) + long + b"s."), "names of more than")
    refused(read_pickled, path, pth(good(b"]" * 5000 + b"a" * 4999)), "names of more than|RecursionError")


def test_records_of_a_training_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """However long, under names that occur twice, or of types of modules that a file could do harm with."""
    content = {
        "model": {"w": torch.ones(3)},
        "losses": [float(i) for i in range(400_000)],
        "log": {1: 0.1, "1": "x", "rows": [{"step": i, "loss": 0.5} for i in range(1000)]},
        "cfg": {"a.b": 1, "a": {"b": 2}},
        "machine": [os.uname(), os.stat(tmp_path), os.times(), os.terminal_size((80, 24))],
    }
    save(tmp_path / "a.pth", content)
    checkpoint = read_pickled(tmp_path / "a.pth")
    assert same(checkpoint.tensors, {"model.w": torch.ones(3)})
    assert checkpoint.others == {
        "losses": "list", "log.1": "str", "log.rows": "list", "cfg.a.b": "int", "machine.0": "uname_result",
        "machine.1": "stat_result", "machine.2": "times_result", "machine.3": "terminal_size",
    }  # fmt: skip
    save(tmp_path / "a.pth", {"model": {"w": torch.ones(3)}, "losses": {i: float(i) for i in range(290_000)}})
    assert read_pickled(tmp_path / "a.pth").tensors.keys() == {"model.w"}


def test_a_list_that_contains_itself(tmp_path: Path) -> None:
    path, ends = tmp_path / "a.pth", b"s" + text("w") + tensor() + b"s."
    path.write_bytes(pth(b"\x80\x02}" + text("x") + b"]q\0h\0a" + ends))
    assert read_pickled(path).others == {"x": "list"}
    refused(read_pickled, path, pth(b"\x80\x02}" + text("x") + b"]q\0h\0a" + tensor() + b"a" + ends), "Recursion")


@NEW_AND_OLD
@pytest.mark.filterwarnings("ignore:torch.(ao.quantization|quantize_per)", "ignore:TypedStorage")
def test_quantized_tensors_are_named_and_left(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "a.pth"
    whole = torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8)
    rows = torch.quantize_per_channel(torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.quint8)
    layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 3)), {nn.Linear}).state_dict()
    save(path, {"model": {"w": torch.ones(3)}, "q": {"a": whole, "b": rows, **layer}}, new)
    match = r"a.pth: q.a is quantized \(of 3 such tensors\), so it is not read; save the state dict of the model before"
    with pytest.warns(UserWarning, match=match):
        checkpoint = read_pickled(path)
    assert same({key: checkpoint.tensors[key] for key in ("model.w",)}, {"model.w": torch.ones(3)})
    assert checkpoint.others["q.b"] == checkpoint.others["q.0._packed_params._packed_params.0"] == "a quantized tensor"

    state = vit.create_model("vit_digits_patch4_32", depth=1).state_dict()
    save(path, {**state, "head.weight": torch.quantize_per_tensor(state["head.weight"], 0.1, 0, torch.qint8)}, new)
    with (
        pytest.warns(UserWarning, match="head.weight is quantized"),
        pytest.raises(CheckpointError, match="head.weight is of type a quantized tensor, expected a tensor"),
    ):
        vit.load_pretrained(path, num_heads=2)


def test_views_that_would_be_copied_without_end_are_refused(tmp_path: Path) -> None:
    floats = torch.zeros(10_001)
    save(tmp_path / "a.pth", {str(i): floats[: 10_000 - i] for i in range(50)})
    refused(read_pickled, tmp_path / "a.pth", match="views of tensors")


def test_arguments_that_many_share_are_not_copied(tmp_path: Path) -> None:
    many = b"(" + b"N" * 300_000 + b"tq\0"
    path, kind = tmp_path / "a.pth", name("foreign.Kind")
    calls = b"](" + kind + many + b"R" + (kind + b"h\0R" + kind + b")\x81h\0b") * 3000 + b"e"
    path.write_bytes(pth(b"\x80\x02}" + text("x") + calls + b"s" + text("w") + tensor() + b"s."))
    with taking_less_than(40 * 2**20):
        assert same(read_pickled(path).tensors, {"w": torch.arange(6.0).reshape(2, 3)})


def test_keys_that_nest_are_not_hashed(tmp_path: Path) -> None:
    nested = b")" + b"\x85" * 250_000 + integer(1) + b"s"
    (tmp_path / "a.pth").write_bytes(pth(b"\x80\x02}" + nested + text("w") + tensor() + b"s."))
    checkpoint = read_pickled(tmp_path / "a.pth")
    assert checkpoint.tensors.keys() == {"w"} and checkpoint.others == {"tuple[0]": "int"}


def test_large_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pth(b"\x80\x02" + b"}" * 2**23 + b"."))
    with pytest.raises(CheckpointError, match="data.pkl has 8388611 bytes"):
        read_pickled(tmp_path / "a.pth")
    refused(read_pickled, tmp_path / "b.pth", legacy(b"\x80\x02" + text("x" * 2**23) + b"."), "does not end")


def test_zip_files_that_two_readers_read_differently_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save(path, {"w": torch.arange(6.0)})
    ours, real = pth(good()), path.read_bytes()
    assert real[-42:-38] == b"PK\6\7"
    refused(read_pickled, path, pth(good(), **{"DATA/0": FLOATS}), "differ only in case")
    refused(read_pickled, path, rezipped(("a/data.pkl", good()), ("b/x", b"")), "expected all in the folder 'a'")
    refused(read_pickled, path, rezipped(("a/data", good())), "no a/data.pkl")
    refused(read_pickled, path, patched(ours, len(ours) - 2, b"\1\0") + b"x", "does not end as torch.save")  # a comment
    refused(read_pickled, path, ours[:30] + ours, "does not end as torch.save")  # something before it
    count = struct.unpack("<H", ours[-12:-10])[0]
    for wrong in (count - 1, count + 1):
        refused(
            read_pickled,
            path,
            patched(ours, len(ours) - 12, struct.pack("<H", wrong)),
            "does not end as torch.save",
        )
    for content in (ours, real):
        for place in (-10, -6):  # offset and length of the list
            for change in (1, 46, -46):
                number = struct.unpack("<I", content[place:][:4])[0] + change
                refused(read_pickled, path, patched(content, len(content) + place, struct.pack("<I", number % 2**32)))
    for place in (-34, -50, -58, -66, -74):  # in 64 bits: where the end is, where the list is, its length, its members
        number = struct.unpack("<Q", real[place:][:8])[0]
        refused(read_pickled, path, patched(real, len(real) + place, struct.pack("<Q", number + 1)))


def test_folders_are_refused(tmp_path: Path) -> None:
    """For a folder, torch allocates memory and leaves it uninitialized: it may hold other data."""
    content = pth(good())
    place = content.rindex(b"PK\1\2") + 38  # the attributes of data/0, the last record
    refused(read_pickled, tmp_path / "a.pth", patched(content, place, b"\x10"), "a/data/0 is a folder")
    inside = tensor(storage(key="1/"))
    refused(read_pickled, tmp_path / "a.pth", pth(good(inside), **{"data/1/": FLOATS}), "is a folder, expected files")


def test_compressed_and_damaged_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for record, content in (("data.pkl", good()), ("version", b"3\n"), ("data/0", FLOATS)):
            archive.writestr(f"a/{record}", content)
    refused(read_pickled, path, match="is compressed")
    content = pth(good())
    refused(read_pickled, path, patched(content, content.index(FLOATS) + 3, b"x"), "a/data/0 is damaged")
    refused(read_pickled, path, rezipped(("a/data.pkl", good()), ("a/data.pkl", good())), "two members")


def test_legacy_files_that_lie_are_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "a.pth", good(tensor(OLD))
    length = struct.pack("<q", 6)
    refused(read_pickled, path, legacy(content, keys=()), "lists memory that its tensors do not use")
    refused(read_pickled, path, legacy(content, keys=("0", "0")), "lists memory that its tensors do not use")
    refused(read_pickled, path, legacy(content, keys=("0", 1)))
    refused(read_pickled, path, legacy(content, floats=length + FLOATS + b"x"), "expected")
    refused(read_pickled, path, legacy(content, floats=length + FLOATS[:-1]), "expected")
    refused(read_pickled, path, legacy(content, floats=struct.pack("<q", 2**40) + FLOATS))
    refused(read_pickled, path, legacy(content, floats=struct.pack("<q", -6) + FLOATS))
    view = storage(more=b"(" + text("1") + integer(0) + integer(6) + b"t")
    refused(read_pickled, path, legacy(good(tensor(view))), "does not describe a storage")
    other = storage(count=3, more=b"N")
    refused(
        read_pickled, path, legacy(good(b"](" + tensor(OLD) + tensor(other, size=(3,), stride=(1,)) + b"e")), "disagree"
    )
    many = b"".join(tensor(storage(key=str(i), count=60, more=b"N")) for i in range(9))
    refused(read_pickled, path, legacy(good(b"](" + many + b"e")), "need more: it is truncated")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "does not end"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a complete file of torch.save"),
        (b"<!DOCTYPE html>", "not a complete file of torch.save"),
        (b"PK\3\4", "BadZipFile"),
        (pickle.dumps({"a": 1}, 2), "neither the zip format nor the one before it"),
        (pickle.dumps({"a": 1}, 4), "not a complete file of torch.save"),
        (bytes(257) + b"ustar\x0000" + bytes(248), "a tar file"),
        (b"\x80\x02\x95" + struct.pack("<Q", 2**62), "opcode 0x95, which torch.save does not write"),
        (b"\x80\x02\x8e" + struct.pack("<Q", 2**40), "opcode 0x"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40), "opcode 0x"),
        (b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"abc", "does not end"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    refused(read_pickled, tmp_path / "a.pth", content, match)


class Level(enum.Enum):
    HIGH = 2


class Options(dict):
    """A dictionary with attributes, as many libraries have one."""


class Holder:
    def __init__(self, content: Any) -> None:
        self.content = content


FOREIGN = {
    "epoch": np.int64(3), "best": np.float32(0.5), "curve": np.arange(3.0), "out": Path("runs/1"), "seen": {1, 2},
    "options": argparse.Namespace(lr=0.1, w=[1]), "log": defaultdict(list, {"a": [1]}), "when": datetime(2024, 1, 2),
    "level": Level.HIGH, "config": Options(a={"b": 1}), "pair": 1 + 2j, "raw": b"\x00\xff", "dtype": torch.bfloat16,
    "layout": torch.strided, "rate": Decimal("0.1"), "queue": deque([1, 2]), "kind": nn.Linear,
    "call": functools.partial(max, 3), "none": torch.empty(0, 3), "counts": Counter("aab"), "grid": (range(3),),
    "scores": {("val", 1): 0.5, None: 1, Level.HIGH: 2, b"k": 3},
}  # fmt: skip


@NEW_AND_OLD
def test_what_is_not_a_tensor_does_not_stand_in_the_way(tmp_path: Path, new: bool) -> None:
    weights = defaultdict(dict, w=torch.arange(6.0))
    save(tmp_path / "a.pth", {"state_dict": weights, "again": OrderedDict(w=torch.ones(2)), **FOREIGN}, new)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)
    checkpoint = read_pickled(tmp_path / "a.pth")
    assert same(checkpoint.tensors, {"state_dict.w": torch.arange(6.0), "again.w": torch.ones(2)})
    assert checkpoint.others.items() >= {
        "epoch": "scalar", "best": "scalar", "out": "PosixPath", "options": "Namespace", "log.a": "list",
        "level": "Level", "config": "Options", "none": "a tensor without values", "scores.tuple[0]": "float",
        "dtype": "dtype", "kind": "Linear", "when": "datetime", "scores.NoneType[1]": "int",
    }.items()  # fmt: skip
    assert {name.partition(".")[0] for name in checkpoint.others} == FOREIGN.keys()


@NEW_AND_OLD
def test_classes_that_do_not_exist_here(tmp_path: Path, new: bool) -> None:
    value = name("gone.away.Config") + b")\x81}" + text("x") + name("gone.f") + b"(" + integer(3) + b"tRsb"
    w = b"s" + text("w") + (tensor() if new else tensor(OLD))
    (tmp_path / "a.pth").write_bytes((pth if new else legacy)(b"\x80\x02}" + text("c") + value + w + b"s."))
    checkpoint = read_pickled(tmp_path / "a.pth")
    assert same(checkpoint.tensors, {"w": torch.arange(6.0).reshape(2, 3)}) and checkpoint.others == {"c": "Config"}


@NEW_AND_OLD
@pytest.mark.parametrize(
    ("kind", "value"),
    [("Linear", nn.Linear(2, 2)), ("Holder", Holder({"a": [(torch.ones(1),)]})), ("Options", Options(w=torch.ones(2))),
     ("_rebuild_sparse_tensor", torch.eye(2).to_sparse()), ("Namespace", argparse.Namespace(w=torch.ones(2)))],
)  # fmt: skip
def test_tensors_within_objects_are_said_to_be_left(tmp_path: Path, kind: str, value: Any, new: bool) -> None:
    save(tmp_path / "a.pth", {"model": {"w": torch.ones(3)}, "ema": value}, new)
    with pytest.warns(UserWarning, match=f"a.pth: the tensors within ema, which is {kind}, are not read"):
        checkpoint = read_pickled(tmp_path / "a.pth")
    assert same(checkpoint.tensors, {"model.w": torch.ones(3)}) and checkpoint.others == {"ema": kind}


def test_under_the_models_own_keys_they_are_refused(tmp_path: Path) -> None:
    state = vit.create_model("vit_digits_patch4_32", depth=1).state_dict()
    for value, kind in ((np.ones(64, np.float32), "_reconstruct"), (torch.ones(0), "a tensor without values")):
        save(tmp_path / "a.pth", {"model": {**state, "norm.bias": value}, "epoch": np.int64(1)})
        with pytest.raises(CheckpointError, match=rf"norm\.bias is of type {kind}, expected a tensor"):
            vit.load_pretrained(tmp_path / "a.pth", num_heads=2)
    save(tmp_path / "a.pth", {"model": state, **FOREIGN})
    model = vit.load_pretrained(tmp_path / "a.pth", num_heads=2)
    assert same(model.state_dict(), state)


@NEW_AND_OLD
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pth_files_are_refused(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "a.pth"
    right = {key: value for key, value in values().items() if new or value.dtype != torch.uint32}
    save(path, right, new)
    content = path.read_bytes()
    for stop in range(0, len(content), len(content) // 50):
        refused(read_pickled, path, content[:stop])
    # The old format has no checksum
    loaded = sum(survives(read_pickled, path, data, right if new else None) for data in damaged(content, 400, seed=2))
    assert 0 < loaded < 300


@NEW_AND_OLD
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_in_sound_files_are_refused(tmp_path: Path, new: bool) -> None:
    """As above, but with the right checksums, so that the two unpicklers read it."""
    state = OrderedDict(a=torch.ones(3), b=nn.Parameter(torch.ones(2, 2)), c={"d": [1, 2.5, None, True, "x"]})
    save(tmp_path / "a.pth", {"model": state, "args": argparse.Namespace(x=1)}, new)
    content = (tmp_path / "a.pth").read_bytes()
    if new:
        archive = zipfile.ZipFile(io.BytesIO(content))
        records = {key.partition("/")[2]: archive.read(key) for key in archive.namelist()}
        content = records.pop("data.pkl")
    loaded = 0
    for data in damaged(content, 500, seed=3):
        loaded += survives(read_pickled, tmp_path / "b.pth", pth(data, **records) if new else data)
    assert 0 < loaded < 400
