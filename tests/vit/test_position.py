"""Resampled position embeddings, each rule against the function it is named after."""

from itertools import combinations

import pytest
import scipy.ndimage
import torch
import transformers
from helpers import FLOAT32, GRADIENT, difference, images, randomize
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models.vision_transformer import interpolate_embeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings

import vit
from vit.position import RULES, _ratio, resample_position_embedding


def embedding_of(grid, width=24):
    return images(1, grid[0] * grid[1], width, 1)[..., 0]


def by_timm(embedding, stored, wanted):
    return resample_abs_pos_embed(embedding, list(wanted), list(stored), num_prefix_tokens=0)


def by_transformers(config_class, embeddings_class):
    """The method of a real module of transformers; it takes stored grids to be square."""

    def resample(embedding, stored, wanted):
        config = config_class(hidden_size=embedding.shape[-1], image_size=4 * stored[0], patch_size=4)
        module = embeddings_class(config)
        del module.position_embeddings  # the parameter, so that a tensor with a history can take its place
        module.position_embeddings = with_class_row(embedding)
        tokens = torch.empty(1, 1 + wanted[0] * wanted[1], embedding.shape[-1])
        return module.interpolate_pos_encoding(tokens, 4 * wanted[0], 4 * wanted[1])[:, 1:]

    return resample


def by_torchvision(embedding, stored, wanted):
    """torchvision's loader for squares, and the function that it calls for all other grids."""
    if stored[0] == stored[1] and wanted[0] == wanted[1]:
        state = {"encoder.pos_embedding": with_class_row(embedding)}
        return interpolate_embeddings(4 * wanted[0], 4, state)["encoder.pos_embedding"][:, 1:]
    return by_interpolate(embedding, stored, size=wanted, align_corners=True)


def by_scipy(embedding, stored, wanted, mode="constant"):
    """What google-research/vision_transformer's loader calls, there for squares. The loader leaves `mode` alone."""
    grid = embedding[0].unflatten(0, stored).numpy()
    zoom = (wanted[0] / stored[0], wanted[1] / stored[1], 1)
    return torch.from_numpy(scipy.ndimage.zoom(grid, zoom, order=1, mode=mode)).flatten(0, 1)[None]


def by_dinov2(embedding, stored, wanted):
    """github.com/facebookresearch/dinov2, `interpolate_pos_encoding`, rewritten here: the package is not on PyPI."""
    if wanted == stored:
        return embedding
    return by_interpolate(embedding, stored, scale_factor=[(new + 0.1) / old for old, new in zip(stored, wanted)])


def by_interpolate(embedding, stored, **options):
    grid = embedding.unflatten(1, stored).permute(0, 3, 1, 2)
    return interpolate(grid, mode="bicubic", **options).flatten(2).transpose(1, 2)


def with_class_row(embedding):
    return torch.cat([torch.zeros(1, 1, embedding.shape[-1]), embedding], dim=1)


# The source, the rule's name, the function.
SOURCES = {
    "timm": ("timm", by_timm),
    "ViT": ("transformers", by_transformers(transformers.ViTConfig, ViTEmbeddings)),
    "DINOv2 of transformers": ("transformers", by_transformers(transformers.Dinov2Config, Dinov2Embeddings)),
    "DINOv2 with registers": (
        "timm",
        by_transformers(transformers.Dinov2WithRegistersConfig, Dinov2WithRegistersEmbeddings),
    ),
    "torchvision": ("torchvision", by_torchvision),
    "scipy": ("jax", by_scipy),
    "DINOv2": ("dinov2", by_dinov2),
}
SQUARE = [
    ((14, 14), (24, 24)), ((14, 14), (16, 10)), ((14, 14), (7, 28)), ((14, 14), (1, 13)), ((14, 14), (3, 2)),
    ((37, 37), (16, 16)), ((14, 14), (64, 128)), ((14, 14), (14, 9)), ((14, 14), (1, 1)), ((1, 1), (5, 3)),
    ((16, 16), (37, 31)), ((24, 24), (13, 13)), ((7, 7), (7, 7)),
]  # fmt: skip
OBLONG = [((4, 9), (6, 6)), ((3, 1), (1, 7)), ((13, 17), (17, 13)), ((1, 5), (11, 5)), ((19, 7), (5, 23))]
SQUARE_ONLY = ("ViT", "DINOv2 of transformers", "DINOv2 with registers", "DINOv2")
CASES = [(source, *grids) for source in SOURCES for grids in SQUARE + OBLONG * (source not in SQUARE_ONLY)]


@pytest.mark.parametrize(("source", "stored", "wanted"), CASES)
def test_equals_its_source(source, stored, wanted):
    rule, function = SOURCES[source]
    embedding = embedding_of(stored)
    ours = resample_position_embedding(embedding, stored, wanted, rule)
    assert difference(ours, function(embedding, stored, wanted)) <= FLOAT32


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "scipy"])
@pytest.mark.parametrize("wanted", [(9, 20), (5, 5), (14, 14)])
def test_gradient_equals_its_source(source, wanted):
    rule, function = SOURCES[source]
    gradients = []
    for resample in (lambda *grids: resample_position_embedding(*grids, rule), function):
        embedding = embedding_of((14, 14)).requires_grad_()
        (
            resample(embedding, (14, 14), wanted) * images(1, wanted[0] * wanted[1], 24, 1, seed=2)[..., 0]
        ).sum().backward()
        gradients.append(embedding.grad)
    assert difference(*gradients) <= GRADIENT


@pytest.mark.parametrize("wanted", [(9, 20), (3, 5)])
def test_gradient_equals_scipy(wanted):
    """scipy has no gradients; resampling the unit vectors gives its matrix, and that has."""
    matrix = by_scipy(torch.eye(49)[None], (7, 7), wanted)[0]  # [h'w', hw]
    upstream = images(1, wanted[0] * wanted[1], 24, 1, seed=2)[..., 0]
    embedding = embedding_of((7, 7)).requires_grad_()
    (resample_position_embedding(embedding, (7, 7), wanted, "jax") * upstream).sum().backward()
    assert difference(embedding.grad, matrix.T @ upstream) <= GRADIENT


def test_scipys_lost_border_is_kept():
    """16 -> 30: scipy's loop places the last row beyond the border, by rounding, and returns zeros for it."""
    embedding = embedding_of((16, 16))
    ours = resample_position_embedding(embedding, (16, 16), (30, 30), "jax")
    assert difference(ours, by_scipy(embedding, (16, 16), (30, 30), mode="nearest")) <= FLOAT32
    inner = [x.unflatten(1, (30, 30))[:, :-1, :-1] for x in (ours, by_scipy(embedding, (16, 16), (30, 30)))]
    assert difference(*inner) <= FLOAT32


@pytest.mark.parametrize(("one", "other"), list(combinations(RULES, 2)))
def test_no_rule_passes_for_another(one, other):
    for wanted in ((24, 24), (16, 14), (7, 28), (9, 5)):
        ours = [resample_position_embedding(embedding_of((14, 14)), (14, 14), wanted, rule) for rule in (one, other)]
        assert difference(*ours) > 1e-3, wanted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [(14, 14), (7, 28), (1, 13), (1, 1)])
def test_the_same_grid_is_the_identity(rule, grid):
    embedding = embedding_of(grid)
    assert resample_position_embedding(embedding, grid, grid, rule) is embedding


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "dinov2"])
def test_the_same_side_is_the_identity(rule):
    for n in range(1, 130):
        assert torch.equal(RULES[rule](n, n, torch.device("cpu")), torch.eye(n)), n


def test_dinov2_moves_the_side_that_stays():
    """Its factor (14 + 0.1) / 14 is not 1, so if one side changes, both are resampled."""
    embedding = embedding_of((14, 14))
    ours = resample_position_embedding(embedding, (14, 14), (14, 9), "dinov2")
    one_side = by_interpolate(embedding, (14, 14), scale_factor=[1.0, 9.1 / 14])
    assert difference(ours, one_side) > 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_float32_and_sum_to_one(rule):
    for sizes in ((14, 24), (14, 5), (1, 7), (7, 1), (37, 64), (42, 20)):
        weights = RULES[rule](*sizes, torch.device("cpu"))
        assert weights.dtype == torch.float32
        assert (weights.shape[1], weights.shape[0]) == sizes
        assert torch.allclose(weights.sum(dim=1), torch.ones(()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_keeps_the_dtype_and_computes_in_float32(rule):
    embedding = embedding_of((14, 14))
    exact = resample_position_embedding(embedding.bfloat16().float(), (14, 14), (9, 20), rule)
    with torch.autocast("cpu", torch.bfloat16):
        half = resample_position_embedding(embedding.bfloat16(), (14, 14), (9, 20), rule)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


def test_compiles_once_for_all_sizes():
    def loss(embedding, canvas):
        grid = canvas.shape[0], canvas.shape[1]
        return resample_position_embedding(embedding, (7, 7), grid, "dinov2").square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(grid):
        results = []
        for function in (loss, compiled):
            embedding = embedding_of((7, 7)).requires_grad_()
            function(embedding, torch.empty(grid)).backward()
            results.append(embedding.grad)
        assert difference(*results) <= GRADIENT, grid

    check((9, 5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for grid in ((4, 20), (13, 3), (7, 11), (24, 24)):
            check(grid)
    check((7, 7))  # the stored grid is a graph of its own


class Positions(nn.Module):
    """The position embedding of images of 4 x 4 patches, as a model asks for it."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.embedding = nn.Parameter(embedding_of((7, 5)))

    def forward(self, images):
        return resample_position_embedding(
            self.embedding, (7, 5), (images.shape[2] // 4, images.shape[3] // 4), self.rule
        )


def export(model, *example, strict=False):
    h, w = (torch.export.Dim(name, min=2, max=64) for name in "hw")
    return torch.export.export(
        model, (images(*example),), dynamic_shapes={"images": {2: 4 * h, 3: 4 * w}}, strict=strict
    ).module()


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_an_exported_graph_serves_all_grids_and_is_the_identity_at_the_stored_one(rule):
    positions = Positions(rule)
    exported = export(positions, 1, 3, 24, 40)
    for size in ((24, 40), (28, 40), (64, 20), (20, 28), (8, 12)):
        x = images(1, 3, *size)
        assert difference(exported(x), positions(x)) <= FLOAT32, size
    assert torch.equal(exported(images(1, 3, 28, 20)), positions.embedding)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("rule", ["transformers", "dinov2"])
@torch.no_grad()
def test_models_export_with_their_rule(rule, strict):
    model = small(rule)
    exported = export(model, 1, 3, 28, 20, strict=strict)
    for size in ((28, 20), (28, 40), (12, 64)):
        x = images(1, 3, *size)
        assert difference(exported(x), model(x)) <= FLOAT32, size


def small(rule: str) -> vit.ViT:
    config = vit.ViTConfig(
        img_size=(28, 20), patch_size=4, embed_dim=8, num_heads=2, depth=1, num_classes=3, position_rule=rule
    )
    return randomize(vit.ViT(config)).eval()


def targets(exported: torch.export.ExportedProgram) -> list[str]:
    graphs = [module.graph for module in exported.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("rule", "strict"), [*((rule, False) for rule in RULES), ("dinov2", True)])
@torch.no_grad()
def test_an_export_for_one_size_decides_at_export_time(rule, strict):
    """At the stored grid nothing is resampled, and there is no autocast wrapper, which CoreML cannot convert."""
    model = small(rule)
    found = {}
    for size in ((28, 20), (20, 28)):
        x = images(2, 3, *size)
        exported = torch.export.export(model, (x,), strict=strict)
        assert difference(exported.module()(x), model(x)) <= FLOAT32
        found[size] = targets(exported)
        assert not any("eye" in target for target in found[size])
    assert not any(part in target for target in found[28, 20] for part in ("arange", "matmul", "autocast"))
    assert any("arange" in target for target in found[20, 28])  # the control: as many patches, another grid


@pytest.mark.parametrize(
    ("size", "dynamic", "strict"),
    [((28, 20), 2, False), ((28, 20), 3, False), ((28, 24), 2, False), ((20, 20), 3, False), ((28, 20), 3, True)],
)
@torch.no_grad()
def test_one_side_may_be_dynamic(size, dynamic, strict):
    model, side = small("dinov2"), 4 * torch.export.Dim("side", min=2, max=64)
    exported = torch.export.export(model, (images(2, 3, *size),), dynamic_shapes=({dynamic: side},), strict=strict)
    for other in (20, 28, 8, 52):
        x = images(2, 3, *(other if axis == dynamic else size[axis - 2] for axis in (2, 3)))
        assert difference(exported.module()(x), model(x)) <= FLOAT32, other


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_divides_symbols(rule):
    """OpenVINO converts no quotient of sizes, only of tensors."""
    h, w = (4 * torch.export.Dim(name, min=2, max=64) for name in "hw")
    exported = torch.export.export(small(rule), (images(2, 3, 28, 20),), dynamic_shapes=({2: h, 3: w},))
    assert not any("truediv" in str(node.target) for m in exported.graph_module.modules() for node in m.graph.nodes)


@pytest.mark.parametrize("rule", ["timm", "transformers", "dinov2"])
def test_dividing_tensors_gives_the_bits_of_dividing_numbers(rule):
    """In float64 and rounded, as the libraries place their samples."""
    for old in range(1, 40):
        for new in range(1, 80):
            tenths = 1 if rule == "dinov2" else 0
            found = _ratio(10 * old, 10 * new + tenths, torch.device("cpu"))
            assert found.item() == torch.tensor(old / (new + tenths / 10)).item(), (old, new)


@pytest.mark.parametrize(
    "shapes", [None, ({2: 4 * torch.export.Dim("h", min=2), 3: 4 * torch.export.Dim("w", min=2)},)]
)
def test_an_export_runs_under_autocast(shapes):
    """With positions in float32, as in the model itself."""
    model, x = small("dinov2"), images(2, 3, 20, 28)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert difference(exported(x).float(), model(x).float()) <= 1e-3


SIZES = [(28, 20), (20, 28), (8, 8), (64, 12), (12, 20), (28, 52), (76, 44)]


@pytest.mark.parametrize("rule", ["timm", "dinov2"])
@torch.no_grad()
def test_onnx_serves_all_sizes(rule, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, path = small(rule), str(tmp_path / "model.onnx")
    B, h, w = (torch.export.Dim(name, min=2, max=64) for name in "Bhw")
    shapes = {"images": {0: B, 2: 4 * h, 3: 4 * w}}
    torch.onnx.export(model, (images(2, 3, 28, 20),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path)
    for i, size in enumerate(SIZES):
        x = images(2 + i % 3, 3, *size)
        (found,) = session.run(None, {"images": x.numpy()})
        assert difference(torch.from_numpy(found), model(x)) <= FLOAT32, size


@pytest.mark.parametrize("rule", ["timm", "dinov2"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
@torch.no_grad()
def test_openvino_serves_all_sizes(rule):
    openvino = pytest.importorskip("openvino")
    model, (B, h, w) = small(rule), (torch.export.Dim(name, min=2, max=64) for name in "Bhw")
    exported = torch.export.export(
        model, (images(2, 3, 28, 20),), dynamic_shapes={"images": {0: B, 2: 4 * h, 3: 4 * w}}
    )
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    for source in ({"input_model": exported}, {"input_model": model, "example_input": images(2, 3, 28, 20)}):
        compiled = openvino.compile_model(openvino.convert_model(**source), "CPU", exact)
        for i, size in enumerate(SIZES):
            x = images(2 + i % 3, 3, *size)
            assert difference(torch.from_numpy(compiled([x.numpy()])[0]), model(x)) <= FLOAT32, size


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
@torch.no_grad()
def test_a_traced_model_is_right_at_every_size(rule, monkeypatch):
    """Traced at its own size, as OpenVINO's `convert_model` does it; a branch on the grid would become a constant."""
    model = small(rule)
    traced = torch.jit.trace(model, images(1, 3, 28, 20))
    for size in ((28, 20), (20, 28), (28, 40), (12, 64), (4, 4), (8, 52)):
        x = images(2, 3, *size)
        assert difference(traced(x), model(x)) <= FLOAT32, size
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: False)  # the control: positions as outside of a trace
    wrong = torch.jit.trace(model, images(1, 3, 28, 20))
    x = images(2, 3, 20, 28)  # as many patches, another grid
    assert difference(wrong(x), model(x)) > 1e-3
