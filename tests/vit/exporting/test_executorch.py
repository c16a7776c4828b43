"""ExecuTorch gives what the model gives, with nearly all of the graph in XNNPACK."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from exporting_cases import EVERYTHING, small
from helpers import FLOAT32, difference, images, refused_in_one_line
from torch.nn.functional import cosine_similarity

import vit
from vit.exporting import to_executorch
from vit.resources import digit_images

pytest.importorskip("executorch")


@pytest.mark.parametrize("size", [(28, 20), (20, 28)])
def test_float32(size, tmp_path):
    model, x = small(), images(3, 3, *size)
    vit.export(model, tmp_path / "model.pte", "executorch", img_size=size, batch_size=2, outputs=EVERYTHING)
    loaded = vit.load_exported(tmp_path / "model.pte", threads=1)
    found, wanted = loaded.run(x), vit.exporting.gate.reference(model, x, EVERYTHING)
    assert all(difference(found[name], wanted[name]) <= FLOAT32 for name in EVERYTHING)
    assert model.attends[0].choice.called == "sdpa"  # the caller's model is as it was
    content = (tmp_path / "model.pte").read_bytes()
    assert str(tmp_path).encode() not in content and b"site-packages" not in content
    for end in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pte").write_bytes(content[:end])
        refused_in_one_line(lambda: vit.load_exported(tmp_path / "cut.pte"), "cut.pte is cut short")


@pytest.mark.parametrize(("gelu", "act"), [("erf", torch.nn.GELU), ("tanh", to_executorch.TanhGELU)])
def test_both_forms_of_gelu(gelu, act, tmp_path, monkeypatch):
    model, other, x = small(gelu=gelu), small(gelu={"erf": "tanh", "tanh": "erf"}[gelu]), images(3, 3, 28, 20)
    for mlp in (block.mlp for one in (model, other) for block in one.blocks):
        mlp.fc1.weight.data *= 6  # where the forms differ most
        mlp.fc2.weight.data *= 100
    program, seen = to_executorch.program, []
    monkeypatch.setattr(to_executorch, "program", lambda copied, about: seen.append(copied) or program(copied, about))
    vit.export(model, tmp_path / "model.pte", "executorch", outputs=EVERYTHING)
    found = vit.load_exported(tmp_path / "model.pte", threads=1).run(x)
    wanted, wrong = (vit.exporting.gate.reference(one, x, EVERYTHING) for one in (model, other))
    assert all(difference(found[name], wanted[name]) <= FLOAT32 for name in EVERYTHING)
    assert all(difference(wrong[name], wanted[name]) > 5 * FLOAT32 for name in ("logits", "features"))  # the control
    assert [type(block.mlp.act) for block in seen[0].blocks] == [act, act]
    assert [type(block.mlp.act) for block in model.blocks] == [torch.nn.GELU] * 2  # the caller's model is as it was


def test_threads_get_their_own_answers(tmp_path):
    """Without a lock of ours: a call holds Python's."""
    vit.export(small(), tmp_path / "model.pte", img_size=28, outputs=EVERYTHING)
    loaded = vit.load_exported(tmp_path / "model.pte", threads=1)
    several = [images(1, 3, 28, 28, seed=i) for i in range(100)]
    wanted = [loaded(one) for one in several]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(loaded, several), wanted):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_int8(tmp_path):
    model = vit.load_pretrained("vit_digits_patch4_32")
    transform = vit.create_transform(model)
    x = torch.stack([transform(image) for image in digit_images()[0][:100]])
    report = vit.export(model, tmp_path / "model.pte", "executorch", int8=True, calibrate=x)
    loaded = vit.load_exported(tmp_path / "model.pte")
    with torch.no_grad():
        assert cosine_similarity(loaded(x), model(x)).min() > 0.998
        assert difference(loaded(x), model(x)) > 1e-4  # the control
    assert report.bytes < 1.2e6 and report.metadata.precision == "int8"


@pytest.mark.parametrize("option", ["dynamic", "half", "opset"])
def test_options_that_it_does_not_take(option, tmp_path):
    refused_in_one_line(
        lambda: vit.export(small(), tmp_path / "model.pte", "executorch", **{option: 20}), f"--{option} .*executorch"
    )
