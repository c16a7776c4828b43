"""A user's program that touches the public API: type checkers accept it (it is not run).

    pip install --no-deps --target installed .
    MYPYPATH=installed mypy --strict --follow-imports=silent tests/support/typed_user.py

pyright accepts it as well, with `installed` in its `extraPaths`.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import vit
from vit import ViT, ViTConfig, create_transform, load_pretrained
from vit.draw import overlay
from vit.resources import digit_images
from vit.weights import Converted

print(vit.__version__.split("."))
model: ViT = vit.load_pretrained("vit_digits_patch4_32", num_classes=10, device="cpu", dtype=torch.float32)
other = load_pretrained(Path("x.safetensors"), num_heads=6)
fresh = vit.create_model("vit_small_patch16_224", num_classes=10, drop_path_rate=0.1)
names: list[str] = vit.list_models(pretrained=True)
config: ViTConfig = model.config
grid: tuple[int, int] = config.grid
p: int = config.patch_size
image: Image.Image = vit.load_image("photo.jpg")
transform = vit.create_transform(model, size=(160, 320), mode="native", max_tokens=4096)
x: Tensor = transform(image)
images = torch.stack([x, create_transform(model)(image)])
logits = model(images)
logits2: Tensor = model(images, ragged="pad")
probabilities = logits2.softmax(dim=-1)
features: Tensor = model.forward_features(images)
head: Tensor = model.forward_head(features, pre_logits=True)
maps: list[Tensor] = model.forward_intermediates(images, blocks=[-1])
pairs = model.forward_intermediates(images, blocks=[-1], return_prefix_tokens=True)
for patches, prefix in pairs:
    print(patches.shape, prefix.shape)
packed: Tensor = model.forward_packed([x, x])
weights: list[Tensor] = vit.attention_maps(model, images, blocks=[-1], heads=[0], queries="class")
inside = vit.record(model, images, ["blocks.0.attention.q"])
print(inside["blocks.0.attention.q"].shape)
all_names = vit.record(model, images, "?")
with vit.patch(model, {"blocks.0": lambda t: t * 2}) as patched:
    patched(images)
with vit.patch(model, inside):
    model(images)


def cosine(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    return (q @ k.mT).softmax(dim=-1) @ v


class Temperature(nn.Module):
    def __init__(self, config: ViTConfig, block: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.num_heads, 1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        return vit.attention.sdpa(q * self.scale, k, v, bias=bias)


vit.register_attention("cosine", cosine)
vit.register_attention("temperature", Temperature, overwrite=True)
model.set_attention("cosine", blocks=[-2, -1], check=True)
model.set_attention(cosine)
model.set_attention(Temperature)
model.set_attention("flex", score_mod=None)
print(vit.attention_names())
fn = model.attends[3].fn
converted: Converted = vit.weights.convert(model.state_dict(), "vit", "transformers", config=model.config)
tensors: dict[str, Tensor] = converted.state_dict
print(converted.report, converted.config.num_heads, vit.weights.detect_layout(model.state_dict()))
path: Path = vit.save_checkpoint(model, "x.safetensors", layout="vit")
fast = vit.kernels.optimize(model, "int8", images)
fast2 = vit.kernels.optimize(model, torch.float32)
fast_logits: Tensor = fast(images)
vit.kernels.save(fast, "fast.safetensors")
again = vit.kernels.load("fast.safetensors")
reasons: dict[str, str | None] = vit.kernels.available()
vit.kernels.explain(model, images)
pyramid = vit.FeaturePyramid(model)
levels: dict[str, Tensor] = pyramid(images)
channels: int = pyramid.out_channels
if model.categories is not None:
    print(model.categories[int(logits2.argmax())])
if model.provenance is not None:
    print(model.provenance.sha256, model.preprocessing.mean[0])
model.reset_classifier(10)
for name, parameter in model.named_parameters():
    print(name, parameter.shape)
digits, labels = digit_images()
print(digits[0].size, labels.shape, overlay)
