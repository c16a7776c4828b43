"""Optimized models in files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_cases import model
from helpers import images
from safetensors import safe_open
from safetensors.torch import save_file

import vit
from vit.kernels.files import sha256


@torch.inference_mode()
def test_saved_and_loaded(tmp_path: Path) -> None:
    plain = model(init_values=0.3)
    plain.set_attention("reference", [1])
    plain.categories = [f"class {i}" for i in range(10)]
    parent = vit.metadata.Provenance("a.pth", "0" * 64, "timm")
    plain.provenance = vit.metadata.Provenance("b.safetensors", "1" * 64, "vit", parent=parent)
    fast = vit.kernels.optimize(plain)
    file = vit.kernels.save(fast, tmp_path / "fast.safetensors")
    loaded = vit.kernels.load(file)
    x = images(2, 3, 64, 48)
    assert torch.equal(loaded(x), fast(x))
    for part in ("config", "preprocessing", "categories", "provenance"):
        assert getattr(loaded, part) == getattr(fast, part)
    assert [attend.name for attend in loaded.attends] == ["sdpa", "reference", "sdpa"]
    assert list(tmp_path.iterdir()) == [file]
    other = tmp_path / "other"
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode
    other.unlink()
    for categories in (["one"], list(range(10)), dict.fromkeys("abcdefghij")):
        fast.categories = categories
        with pytest.raises(ValueError, match="categories must be 10 strings or None"):
            vit.kernels.save(fast, tmp_path / "other.safetensors")
    fast.categories = None
    fast.preprocessing = vit.Preprocessing(64, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="preprocessing has 1 channels, the model has 3"):
        vit.kernels.save(fast, tmp_path / "other.safetensors")
    assert list(tmp_path.iterdir()) == [file]


def test_categories_in_a_tuple(tmp_path: Path) -> None:
    fast = vit.kernels.optimize(model())
    fast.categories = tuple(f"class {i}" for i in range(10))
    loaded = vit.kernels.load(vit.kernels.save(fast, tmp_path / "fast.safetensors"))
    assert loaded.categories == [f"class {i}" for i in range(10)]


def test_what_is_not_saved(tmp_path: Path) -> None:
    plain = model()
    with pytest.raises(ValueError, match=r"expected what vit\.kernels\.optimize returns, not ViT"):
        vit.kernels.save(plain, tmp_path / "a.safetensors")
    fast = vit.kernels.optimize(plain)
    with pytest.raises(ValueError, match=r"a\.pt must end in \.safetensors"):
        vit.kernels.save(fast, tmp_path / "a.pt")
    fast.set_attention(lambda q, k, v, *, bias=None: v, [2])
    with pytest.raises(ValueError, match=r"block 2: a file cannot name its attention .*lambda"):
        vit.kernels.save(fast, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_loaded(tmp_path: Path) -> None:
    file = vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "fast.safetensors")
    whole = file.read_bytes()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        vit.kernels.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no optimized model: load it with vit.load_pretrained"):
        vit.kernels.load(vit.save_checkpoint(model(), tmp_path / "plain.safetensors"))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        file.write_bytes(whole[:-4])
        vit.kernels.load(file)
    for before, after in [
        (b"blocks.0.mlp.fc1.bias", b"blocks.0.mlp.fc9.bias"),
        (b'\\"embed_dim\\": 64', b'\\"embed_dim\\": 32'),
        (b'\\"embed_dim\\": 64', b'\\"embed_din\\": 64'),
        (b'\\"num_heads\\": 2', b'\\"num_heads\\": 4'),
        (b'[\\"sdpa\\", ', b"[          "),
        (b'\\"sdpa\\"', b'\\"sdpb\\"'),
        (b'\\"categories\\": null', b'\\"categories\\": 4444'),
        (b'\\"dtype\\": \\"float32', b'\\"dtype\\": \\"float33'),
        (b'\\"sha256\\"', b'\\"sha257\\"'),
        (b'{\\"dtype\\"', b'[\\"dtype\\"'),
    ]:
        content = whole.replace(before, after)
        assert content != whole
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"fast\.safetensors.* is damaged"):
            vit.kernels.load(file)


def reseal(file: Path, change: Callable[[dict], object]) -> None:
    """Change the header as another version might write it, with a sha256 that matches."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["vit.optimized"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    change(header)
    save_file(tensors, file, {"vit.optimized": json.dumps(header | {"sha256": sha256(tensors, header)})})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["config"].update(new_field=1), r"is not an optimized model as .*argument 'new_field'"),
        (lambda h: h.update(config=[1]), "is not an optimized model as this version of vit saves it: TypeError"),
        (
            lambda h: h.update(preprocessing=None),
            "is not an optimized model as this version of vit saves it: TypeError",
        ),
        (lambda h: h.update(dtype="int4"), "unknown dtype 'int4'.* Known: .*int8"),
        (lambda h: h.update(dtype=3), "unknown dtype 3. Known: float32"),
        (lambda h: h.update(attention=["sdpa"] * 5), "attention of 5 blocks, but the model has 3"),
        (lambda h: h.update(attention=["sdpa"] * 2), "attention of 2 blocks, but the model has 3"),
        (lambda h: h.update(attention=3), "is not an optimized model as this version of vit saves it: TypeError"),
        (lambda h: h.update(categories=["one"]), "categories must be 10 strings or None"),
        (lambda h: h["preprocessing"].update(mean=[0.5], std=[0.5]), "preprocessing has 1 channels, the model has 3"),
    ],
)
def test_a_header_of_another_version(change: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    file = vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "fast.safetensors")
    reseal(file, lambda header: None)
    vit.kernels.load(file)
    reseal(file, change)
    with pytest.raises(ValueError, match=rf"fast\.safetensors.*{message}"):
        vit.kernels.load(file)


def test_a_header_that_is_no_object(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "list.safetensors", {"vit.optimized": "[]"})
    with pytest.raises(ValueError, match=r"list\.safetensors: the file is damaged, or was written by another version"):
        vit.kernels.load(tmp_path / "list.safetensors")


def test_a_damaged_byte_is_seen(tmp_path: Path) -> None:
    file = vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "fast.safetensors")
    whole = bytearray(file.read_bytes())
    for place in (len(whole) - 1, len(whole) // 2, len(whole) - 40_000):
        whole[place] ^= 1
        file.write_bytes(whole)
        with pytest.raises(ValueError, match="fast.safetensors: the file is damaged"):
            vit.kernels.load(file)
        whole[place] ^= 1
    file.write_bytes(whole)
    vit.kernels.load(file)


def test_checkpoints_and_optimized_models_are_not_mixed_up(tmp_path: Path) -> None:
    file = vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "fast.safetensors")
    for call in (lambda: vit.load_pretrained(file), lambda: vit.load_pretrained(file, num_heads=2)):
        with pytest.raises(
            ValueError, match=r"this is an optimized model, not a checkpoint: load it with vit\.kernels\.load"
        ):
            call()
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "nowhere" / "fast.safetensors")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        vit.kernels.load(tmp_path)


@torch.inference_mode()
def test_modes(tmp_path: Path) -> None:
    plain = model()
    fast = vit.kernels.optimize(plain, mode="latency")
    file = vit.kernels.save(fast, tmp_path / "fast.safetensors")
    x = images(2, 3, 64, 64)
    assert torch.equal(vit.kernels.load(file, mode="latency")(x), fast(x))
    for mode, text in {
        "throughput": r"mode='throughput' is for bfloat16 and float16 on a GPU, not for float32: leave out mode",
        "fast": "unknown mode 'fast'",
    }.items():
        with pytest.raises(ValueError, match=text):
            vit.kernels.optimize(plain, mode=mode)
        with pytest.raises(ValueError, match=text):
            vit.kernels.load(file, mode=mode)
