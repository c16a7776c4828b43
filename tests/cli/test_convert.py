"""`vit convert`: what it writes, says and refuses."""

import torch

import vit

DIGITS = "vit_digits_patch4_32"


def test_convert_there_and_back(tmp_path, call, run):
    assert run("convert", DIGITS, tmp_path / "ours.safetensors", "--to", "vit").returncode == 0
    result = call("convert", tmp_path / "ours.safetensors", tmp_path / "theirs", "--to", "timm")
    assert (
        result.returncode == 0 and "vit -> timm" in result.stdout and "every tensor equal bit for bit" in result.stdout
    )
    third = call("convert", tmp_path / "ours.safetensors", tmp_path / "hf", "--to", "transformers")
    assert "\nnot stored  position_rule: readers will assume transformers\n" in third.stdout
    original = vit.load_pretrained(DIGITS)
    back = vit.load_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), back.parameters()))
    assert back.config == original.config and back.categories == original.categories

    before = (tmp_path / "ours.safetensors").read_bytes()
    refused = call("convert", DIGITS, tmp_path / "ours.safetensors", "--to", "vit")
    assert refused.returncode == 2 and "--force replaces" in refused.stderr
    assert (tmp_path / "ours.safetensors").read_bytes() == before
    assert call("convert", DIGITS, tmp_path / "ours.safetensors", "--to", "vit", "--force").returncode == 0
