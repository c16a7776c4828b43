"""The whole model again in NumPy, to show that nothing is hidden: Eq. 1-4 of arXiv:2010.11929 in order.

    python examples/numpy_forward.py -o numpy_forward.png

Takes half a minute, most of it in `math.erf`, one number at a time. The weights are the bundled ones under our names:
they have a class token, but neither registers nor LayerScale, and images have the trained size. It prints

    float64, 20 digits: within 1e-13 of PyTorch's largest logit
    float32, 360 digits: within 1e-05 of PyTorch's largest logit
    99.17% of the held-out digits are classified correctly

and draws where the class token looks in the last block (mean of the heads), and the model's probabilities.
"""

import argparse
import math

import numpy as np
import torch
from matplotlib import pyplot as plt

import vit


def linear(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """A matrix and a bias: [..., inputs] -> [..., outputs]."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: dict[str, np.ndarray], name: str, x: np.ndarray, eps: float) -> np.ndarray:
    """LayerNorm: each token's D numbers get mean 0 and variance 1, then a scale and a shift per channel."""
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    """Positive weights that sum to 1 along the last axis."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def forward(w: dict[str, np.ndarray], config: vit.ViTConfig, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, C, H, W] images -> [B, classes] logits, and the last block's attention weights [B, A, T, T]."""
    (B, C, H, W), p, A = images.shape, config.patch_size, config.num_heads
    # Eq. 1: cut the image into patches, flatten and project each; put the class token in front, add the positions.
    patches = images.reshape(B, C, H // p, p, W // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
    x = patches @ w["patch_embed.proj.weight"].reshape(-1, C * p * p).T + w["patch_embed.proj.bias"]  # [B, N, D]
    x = np.concatenate([w["class_token"].repeat(B, axis=0), x], axis=1) + w["position_embedding"]  # [B, T, D]
    for i in range(config.depth):
        qkv = linear(w, f"blocks.{i}.attention.qkv", norm(w, f"blocks.{i}.norm1", x, config.eps))  # Eq. 2: tokens mix
        q, k, v = qkv.reshape(B, -1, 3, A, x.shape[2] // A).transpose(2, 0, 3, 1, 4)  # each [B, A, T, d]
        weights = softmax(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3]))  # [B, A, T, T]
        heads = (weights @ v).swapaxes(1, 2).reshape(x.shape)  # [B, T, D], heads side by side
        x = x + linear(w, f"blocks.{i}.attention.proj", heads)  # [B, T, D]
        hidden = linear(w, f"blocks.{i}.mlp.fc1", norm(w, f"blocks.{i}.norm2", x, config.eps))  # Eq. 3: each alone
        hidden *= (1 + np.vectorize(math.erf, [x.dtype])(hidden / math.sqrt(2))) / 2  # GELU, [B, T, 4D]
        x = x + linear(w, f"blocks.{i}.mlp.fc2", hidden)  # [B, T, D]
    return linear(w, "head", norm(w, "norm", x[:, 0], config.eps)), weights  # Eq. 4: class token


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", default="numpy_forward.png")
    output = parser.parse_args().output
    torch.set_grad_enabled(False)
    model, (digits, labels) = vit.load_pretrained("vit_digits_patch4_32"), vit.resources.digit_images()
    images = torch.stack([*map(vit.create_transform(model, mode="squash"), digits)])  # [360, 3, 32, 32]
    for dtype, count, bound in ((torch.float64, 20, 1e-13), (torch.float32, 360, 1e-5)):
        w = {name: tensor.numpy() for name, tensor in model.to(dtype).state_dict().items()}
        logits, weights = forward(w, model.config, images[:count].to(dtype).numpy())
        theirs = model(images[:count].to(dtype)).numpy()
        assert np.abs(logits - theirs).max() < bound * np.abs(theirs).max()
        print(f"{logits.dtype}, {count} digits: within {bound} of PyTorch's largest logit")
    print(f"{(logits.argmax(axis=1) == labels.numpy()).mean():.2%} of the held-out digits are classified correctly")
    figure, axes = plt.subplots(3, 5, figsize=(9, 5), subplot_kw={"xticks": [], "yticks": []}, layout="constrained")
    for i, column in enumerate(axes.T):
        column[0].imshow(images[i, 0], cmap="gray")
        column[1].imshow(weights[i, :, 0, 1:].mean(axis=0).reshape(8, 8))
        column[2].bar(range(10), softmax(logits[i]), tick_label=range(10))
    figure.savefig(output, dpi=110)
