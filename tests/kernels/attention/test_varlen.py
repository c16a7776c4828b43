"""The `varlen` attention. Its kernel needs CUDA; the call of it is tested on any machine."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT32, difference, images, randomize

import vit
from vit.kernels.attention.varlen import attend, varlen

SIZES = [(8, 12), (16, 4), (4, 4), (20, 8)]


def model() -> vit.ViT:
    config = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}
    return randomize(vit.ViT(vit.ViTConfig(**config))).eval()


def by_hand(q, k, v, starts, starts_k, longest, longest_k):
    """What `varlen_attn` promises: q, k, v [T, A, d], one image from each start to the next."""
    assert starts is starts_k and starts.dtype == torch.int32 and longest == longest_k == max(starts.diff())
    spans = zip(starts.tolist(), starts.tolist()[1:])
    parts = [F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v))) for a, b in spans]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def test_packed_images_reach_the_kernel_in_one_call(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args[3].tolist())
        return by_hand(*args)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    net, batch = model(), [images(3, *size, seed=i) for i, size in enumerate(SIZES)]
    expected = net.forward_packed(batch)
    net.set_attention(lambda q, k, v, *, bias=None, lengths=None: attend(q, k, v, lengths))
    assert difference(net.forward_packed(batch), expected) <= FLOAT32
    assert calls == [[0, 7, 12, 14, 25]] * 2  # once in each block


def test_a_plain_batch_is_packed_images_of_one_size(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_hand)
    q, k, v = (images(3, 2, 5, 8, seed=i) for i in range(3))
    assert difference(attend(q, k, v, [5, 5, 5]), F.scaled_dot_product_attention(q, k, v)) <= FLOAT32


def test_what_the_kernel_cannot_do_is_refused():
    net = model()
    net.set_attention("varlen")
    with pytest.raises(ValueError, match="block 0: attention 'varlen' runs on cuda, not on cpu"):
        net(images(1, 3, 16, 16))
    assert "varlen" in vit.attention_names()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device, and the kernel has no other")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_it_equals_one_image_at_a_time(dtype):
    net = model().cuda()
    batch = [images(3, *size, seed=i).cuda() for i, size in enumerate(SIZES)]
    expected = torch.cat([net(image[None]) for image in batch])
    net, batch = net.to(dtype), [image.to(dtype) for image in batch]
    plain = torch.cat([net(image[None]) for image in batch])
    net.set_attention("varlen")
    ours, theirs = ((x.float() - expected).square().mean().sqrt() for x in (net.forward_packed(batch), plain))
    assert ours <= 1.5 * theirs
    q = torch.zeros(1, 2, 5, 16, device="cuda", dtype=dtype)
    with pytest.raises(ValueError, match="takes no bias"):
        varlen(q, q, q, bias=q)
