"""Exported files give what the model gives, in ONNX Runtime and OpenVINO; and hold nothing of this machine."""

import errno
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exporting_cases import EVERYTHING, small
from helpers import FLOAT32, difference, images, randomize

import vit
from vit.exporting import to_onnx, write
from vit.exporting.gate import reference

onnx = pytest.importorskip("onnx")
SIZES = [(3, 28, 20), (1, 20, 28), (2, 4, 4), (1, 64, 12), (4, 8, 76)]
VARIANTS = {
    "plain": {},
    "timm's rule": {"position_rule": "timm"},
    "registers": {"reg_tokens": 4, "class_position": False, "init_values": 0.1},
    "two heads": {"dist_token": True, "global_pool": "dist"},
    "both": {"global_pool": "token_avg", "gelu": "tanh"},
    "patches": {"global_pool": "avg", "fc_norm": True, "in_chans": 1, "depth": 1},
}


def check(model: vit.ViT, path: Path, sizes=SIZES, bar=FLOAT32) -> dict[str, float]:
    """Compare every output with the model's at each size; the largest differences."""
    exported = vit.load_exported(path)
    assert exported.metadata.outputs == EVERYTHING
    worst = dict.fromkeys(EVERYTHING, 0.0)
    with torch.no_grad():
        for batch, *size in sizes:
            x = images(batch, model.config.in_chans, *size)
            found, wanted = exported.run(x), reference(model, x, EVERYTHING)
            assert torch.equal(exported(x), found["logits"])
            assert difference(exported(x), model(x)) <= bar
            for name in EVERYTHING:
                worst[name] = max(worst[name], difference(found[name], wanted[name]))
    assert max(worst.values()) <= bar, worst
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_file_serves_all_sizes_and_batches(variant, tmp_path):
    model = small(**VARIANTS[variant])
    if model.config.in_chans == 1:
        model.preprocessing = replace(model.preprocessing, mean=(0.4,), std=(0.2,))
    report = vit.export(model, tmp_path / "model.onnx", outputs=EVERYTHING)
    assert report.files == (str(tmp_path / "model.onnx"),)
    assert report.bytes == (tmp_path / "model.onnx").stat().st_size
    assert {row["output"] for row in report.metadata.parity} == set(EVERYTHING)
    check(model, tmp_path / "model.onnx")


def test_a_file_for_one_size_has_its_positions_folded(exported, tmp_path):
    model = small()
    vit.export(model, tmp_path / "model.onnx", img_size=(20, 28), batch_size=2, outputs=EVERYTHING)
    check(
        model, tmp_path / "model.onnx", [(2, 20, 28), (1, 20, 28), (5, 20, 28)]
    )  # also batches that 2 does not divide
    operations = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operations & {"Range", "Where", "Shape"}
    assert {node.op_type for node in onnx.load(exported).graph.node} >= {"Range", "Where", "Shape"}  # the control
    loaded = vit.load_exported(tmp_path / "model.onnx")
    assert loaded.preprocessing.size == (20, 28)
    for wrong in ((2, 3, 28, 20), (2, 3, 20, 56)):
        with pytest.raises(ValueError, match=r"model.onnx expects \[B, 3, 20, 28\] images .* got"):
            loaded(images(*wrong))


def test_the_own_size_is_the_default_of_a_file_for_one_size(tmp_path):
    vit.export(small(), tmp_path / "model.onnx", dynamic=False)
    metadata = vit.load_exported(tmp_path / "model.onnx").metadata
    assert (metadata.size, metadata.batch) == ((28, 20), 1)


def test_half(tmp_path):
    model = small()
    vit.export(model, tmp_path / "model.onnx", half=True, outputs=EVERYTHING)
    worst = check(model, tmp_path / "model.onnx", bar=2e-3)
    assert worst["logits"] > FLOAT32  # the control: it is not float32
    weights = [w for w in onnx.load(tmp_path / "model.onnx").graph.initializer if w.name.startswith("model.blocks")]
    assert len(weights) >= 16 and {w.data_type for w in weights} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(("opset", "operation"), [(18, "Erf"), (20, "Gelu"), (23, "Attention")])
def test_the_opset_decides_on_operations(opset, operation, tmp_path):
    vit.export(small(), tmp_path / "model.onnx", opset=opset, img_size=8)
    found = onnx.load(tmp_path / "model.onnx")
    assert [one.version for one in found.opset_import if one.domain == ""] == [opset]
    assert sum(node.op_type == operation for node in found.graph.node) == 2  # one for each block


def test_the_same_model_gives_the_same_bytes_without_a_trace_of_this_machine(exported, tmp_path):
    vit.export(small(), tmp_path / "again.onnx", outputs=EVERYTHING)  # vit.export is still the function
    content = (tmp_path / "again.onnx").read_bytes()
    assert content == exported.read_bytes()
    for trace in (str(Path(vit.__file__).parent), str(Path(torch.__file__).parent), "stack_trace", str(tmp_path)):
        assert trace.encode() not in content
    found = onnx.load(tmp_path / "again.onnx")
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*found.graph.input, *found.graph.output)}
    assert [dim.dim_param or dim.dim_value for dim in shapes["images"]] == ["batch", 3, "height", "width"]
    assert [dim.dim_param or dim.dim_value for dim in shapes["attention"]] == ["batch", 2, "rows", "columns"]


def test_exporting_changes_nothing_in_the_model(tmp_path):
    model = small(drop_path_rate=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vit.export(model, tmp_path / "model.onnx", img_size=8)  # random drop path would not pass the check
    assert model.training and model.class_token.requires_grad and model.config.img_size == (28, 20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_a_head_gives_features(tmp_path):
    model = small(num_classes=0)
    vit.export(model, tmp_path / "model.onnx", dynamic=False)
    loaded, x = vit.load_exported(tmp_path / "model.onnx"), images(2, 3, 28, 20)
    with torch.no_grad():
        assert difference(loaded(x), model(x)) <= FLOAT32
    with pytest.raises(ValueError, match="no classifier"):
        vit.export(model, tmp_path / "other.onnx", outputs=("logits",))


def test_metadata_travel(exported, model):
    loaded = vit.load_exported(exported)
    assert (loaded.config, loaded.categories, loaded.preprocessing) == (
        model.config, model.categories, model.preprocessing,
    )  # fmt: skip
    assert loaded.metadata.versions["torch"] == torch.__version__.partition("+")[0]
    assert torch.backends.cpu.get_cpu_capability() in loaded.metadata.processor
    assert all(row["value"] <= row["bar"] == FLOAT32 for row in loaded.metadata.parity)
    found = {one.key: one.value for one in onnx.load(exported).metadata_props}
    assert found["names"] == "{0: 'a 0', 1: 'a 1', 2: 'a 2', 3: 'a 3', 4: 'a 4'}"  # as ultralytics writes them
    assert (found["imgsz"], found["stride"]) == ("[28, 20]", "4")


def test_the_checkpoints_hash_travels(tmp_path):
    vit.save_checkpoint(small(), tmp_path / "model.safetensors")
    loaded = vit.load_pretrained(tmp_path / "model.safetensors")
    vit.export(loaded, tmp_path / "model.onnx", img_size=8)
    exported = vit.load_exported(tmp_path / "model.onnx")
    assert exported.metadata.source == replace(loaded.provenance, source="model.safetensors")
    assert exported.metadata.source == exported.provenance.parent
    assert str(tmp_path).encode() not in (tmp_path / "model.onnx").read_bytes()  # the folder is not in the file


def test_without_a_check_the_file_says_so(tmp_path):
    vit.export(small(), tmp_path / "model.onnx", img_size=8, check=False)
    with pytest.warns(UserWarning, match="exported without a check"):
        assert vit.load_exported(tmp_path / "model.onnx").metadata.parity is None


def renamed(categories: list[str]) -> vit.ViT:
    model = small()
    model.categories = categories
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onx"}, "unknown format 'onx'. Did you mean 'onnx'"),
        ({"opset": 9}, "opset must lie between 18 and 23, not 9"),
        ({"img_size": 30}, "30 x 30 is not made of whole patches of 4 x 4"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"dynamic": True, "batch_size": 2}, "batch_size=2 cannot go with it"),
        ({"outputs": ("logits", "tokens")}, "unknown output 'tokens'"),
        ({"outputs": ()}, "one or more of logits, features, attention"),
        ({"outputs": ("logits", "logits")}, "each once"),
        ({"path": "model.pt"}, "model.pt' says no format: end it in .onnx, .xml, .pt2, "),
        ({"path": "site"}, "site' says no format: end it in .onnx, .xml, .pt2, .tflite, .pte, .mlpackage, or give"),
        ({"path": "model.pt", "format": "onnx"}, "expected the name of a .onnx file to write, not '"),
        ({"model": torch.nn.Linear(1, 1)}, "expected a vit.ViT to export, not Linear"),
        ({"model": torch.nn.Sequential(small())}, "export the ViT in it, model.0"),
        ({"model": renamed(["a", "b"])}, "the model has 5 classes and 2 categories"),
        ({"model": small(num_classes=1), "int8": True}, "int8 is judged by cosines, and one logit has none"),
        ({"model": small().bfloat16()}, "expected a model in float32, not torch.bfloat16: use model.float()"),
        (
            {"format": "coreml", "path": "model.mlpackage", "int8": True, "calibrate": torch.zeros(40, 3, 28, 20)},
            "coreml is int8 without images, and not checked here: leave out calibrate (--calibrate)",
        ),
        (
            {"format": "openvino", "path": "model.xml", "opset": 20},
            "--opset (opset=20) with openvino: that is a number of ONNX's",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(settings, message, tmp_path):
    path = tmp_path / settings.get("path", "model.onnx")
    arguments = {"model": small()} | {name: value for name, value in settings.items() if name != "path"}
    with pytest.raises(ValueError) as error:
        vit.export(path=path, **arguments)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_optimized_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optimized in float32 .* export the model that it was made from"):
        vit.export(vit.kernels.optimize(small()), tmp_path / "model.onnx")


def test_a_missing_package_is_named_with_its_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript is missing: pip install onnx onnxscript onnxruntime"):
        vit.export(small(), tmp_path / "model.onnx")


def test_attention_that_cannot_be_exported_is_named(tmp_path, registered):
    def peeks(q, k, v, *, bias=None):
        return q if q.sum() > 0 else v

    model = small()
    model.set_attention(registered("peeks", peeks))
    with pytest.raises(ValueError, match=r"PyTorch cannot export this model: .*'peeks'; 'sdpa' can be") as error:
        vit.export(model, tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_other_attention_is_exported_as_it_computes(tmp_path):
    def doubled(q, k, v, *, bias=None):
        return torch.nn.functional.scaled_dot_product_attention(2 * q, k, v, attn_mask=bias)

    model, x = small(), images(2, 3, 28, 20)
    with torch.no_grad():
        before = model(x)
        model.set_attention(doubled)
        vit.export(model, tmp_path / "model.onnx", img_size=(28, 20))
        loaded = vit.load_exported(tmp_path / "model.onnx")
        assert difference(loaded(x), model(x)) <= FLOAT32
        assert difference(loaded(x), before) > 1e-3  # the control


def test_a_file_that_exists_is_replaced_only_by_force_and_after_the_check(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        vit.export(small(), path, img_size=8)
    monkeypatch.setattr(write.gate, "BARS", {"float32": 0.0})
    with pytest.raises(vit.exporting.ParityError, match="nothing was written"):
        vit.export(small(), path, img_size=8, force=True)
    assert path.read_text() == "mine"
    monkeypatch.undo()
    vit.export(small(), path, img_size=8, force=True)
    assert vit.load_exported(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fills(model, metadata, path):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(to_onnx, "save", fills)
    with pytest.raises(OSError, match="No space left"):
        vit.export(small(), tmp_path / "folder" / "model.onnx", img_size=8)
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("format", ["onnx", "transformersjs", "web"])
def test_a_place_that_cannot_be_written_to_is_named_before_any_work(format, tmp_path, monkeypatch):
    def export():
        vit.export(small(), tmp_path / "new" / ("model.onnx" if format == "onnx" else "folder"), format)

    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=f"^{tmp_path} cannot be written to, so .* give another place"):
        export()
    monkeypatch.undo()
    (tmp_path / "new").touch()
    with pytest.raises(NotADirectoryError, match=r"new is a file, so .* cannot be written in it: give another place"):
        export()
    (tmp_path / "new").unlink()
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="is a mount point, which cannot be replaced"):
        export()
    assert not list(tmp_path.iterdir())


def test_a_package_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    new, old = tmp_path / "new" / "model.mlpackage", tmp_path / "model.mlpackage"
    for folder, text in ((new, "new"), (old, "old")):
        (folder / "Data").mkdir(parents=True)
        (folder / "Data" / "weight.bin").write_text(text)
    moves, replace_path = iter([True, False, True]), os.replace

    def moved(source, target):
        if not next(moves):
            raise KeyboardInterrupt
        replace_path(source, target)

    monkeypatch.setattr(os, "replace", moved)
    with pytest.raises(KeyboardInterrupt):
        write.publish(tmp_path / "new", old)
    assert (old / "Data" / "weight.bin").read_text() == "old"
    monkeypatch.undo()
    (old / "mine.txt").touch()
    assert write.publish(tmp_path / "new", old)[0] == (str(old), str(old / "Data" / "weight.bin"))
    assert [file.name for file in old.rglob("*")] == ["Data", "weight.bin"]


def test_a_head_of_zeros(tmp_path):
    model = small()
    model.head.weight.data.zero_(), model.head.bias.data.zero_()
    vit.export(model, tmp_path / "model.pt2", img_size=8)
    vit.export(model, tmp_path / "model.onnx", img_size=(28, 20), int8=True)
    assert not vit.load_exported(tmp_path / "model.pt2", trust=True)(images(1, 3, 8, 8)).any()


class Thirds(vit.ViT):
    """A subclass with a forward of its own, which an export of the parts would lose."""

    def forward(self, images, ragged="error"):
        return super().forward(images, ragged).softmax(dim=-1)


@pytest.mark.parametrize("kind", ["subclass", "hook"])
def test_what_a_model_does_beside_its_parts_is_not_lost_in_silence(kind, tmp_path):
    model = small()
    if kind == "subclass":
        model.__class__ = Thirds
    else:
        model.register_forward_hook(lambda module, images, logits: logits / 3)
    with pytest.raises(vit.exporting.ParityError, match="differ from the model's"):
        vit.export(model, tmp_path / "model.onnx", img_size=8)


def test_under_autocast_and_with_checked_attention(tmp_path):
    model = small()
    model.set_attention("sdpa", check=True)
    with torch.autocast("cpu", torch.bfloat16):
        vit.export(model, tmp_path / "model.onnx", img_size=8)
    assert all(attend.check for attend in model.attends)
    check_size = images(1, 3, 8, 8)
    with torch.no_grad():
        assert difference(vit.load_exported(tmp_path / "model.onnx")(check_size), model(check_size)) <= FLOAT32


def test_openvino_does_not_replace_the_weights_of_another_file(tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "model.bin").write_text("mine")
    with pytest.raises(FileExistsError, match="model.bin exists"):
        vit.export(small(), tmp_path / "model.xml", "openvino", img_size=8)
    assert (tmp_path / "model.bin").read_text() == "mine"


def test_a_file_that_another_wrote_meanwhile_is_kept(tmp_path, monkeypatch):
    path, real = tmp_path / "model.onnx", write.gate.judge
    monkeypatch.setattr(write.gate, "judge", lambda rows: (real(rows), path.write_text("mine")))
    with pytest.raises(FileExistsError, match="--force"):
        vit.export(small(), path, img_size=8)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("half", [False, True])
def test_openvino(half, tmp_path):
    pytest.importorskip("openvino")
    model = small()
    report = vit.export(model, tmp_path / "model.xml", "openvino", half=half, outputs=EVERYTHING)
    assert [Path(file).name for file in report.files] == ["model.xml", "model.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    worst = check(model, tmp_path / "model.xml", bar=2e-3 if half else FLOAT32)
    assert (worst["logits"] > FLOAT32) == half
    text = (tmp_path / "model.xml").read_text()
    assert '<labels value="a_0 a_1 a_2 a_3 a_4" />' in text
    assert str(tmp_path) not in text
    vit.export(model, tmp_path / "again.xml", "openvino", half=half, outputs=EVERYTHING)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()


def test_openvino_for_one_size(tmp_path):
    pytest.importorskip("openvino")
    model = small()
    vit.export(model, tmp_path / "model.xml", "openvino", img_size=(20, 28), outputs=EVERYTHING)
    check(model, tmp_path / "model.xml", [(1, 20, 28), (3, 20, 28)])


def test_openvino_refuses_the_weights_of_another_model(tmp_path):
    pytest.importorskip("openvino")
    for name, seed in (("one", 0), ("two", 1)):
        vit.export(small(eps=1e-6 + seed * 1e-5), tmp_path / f"{name}.xml", "openvino")
    content = bytearray((tmp_path / "one.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "one.bin").write_bytes(content)
    with pytest.raises(ValueError, match="one.bin does not hold the weights of"):
        vit.load_exported(tmp_path / "one.xml")
    (tmp_path / "two.bin").unlink()
    with pytest.raises(FileNotFoundError, match="two.bin, which holds the weights .* copy both files"):
        vit.load_exported(tmp_path / "two.xml")


def test_the_report_is_plain_data(tmp_path):
    report = vit.export(small(), tmp_path / "model.onnx", img_size=8)
    text = json.dumps(report.to_dict())
    assert json.loads(text)["metadata"]["size"] == [8, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.load_exported(tmp_path / "model.onnx")


@pytest.mark.slow
def test_one_vit_s_in_onnx(tmp_path):
    model = randomize(vit.create_model("vit_small_patch16_224")).eval()
    report = vit.export(model, tmp_path / "model.onnx", opset=23)
    assert len({row["input"] for row in report.metadata.parity}) == 5
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert sum(node.op_type == "Attention" for node in graph.node) == 12
    x = images(2, 3, 64, 240)
    with torch.no_grad():
        assert difference(vit.load_exported(tmp_path / "model.onnx")(x), model(x)) <= 1e-5
