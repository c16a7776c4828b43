"""What several tests need: weights that hide no mistake, timm's twin of a config, and what "equal" means."""

import re
from collections.abc import Callable

import torch
from peers import timm_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import vit

FLOAT32 = 1e-5  # max|a - b| <= FLOAT32 * max|b|, on logits and tokens
GRADIENT = 2e-5
MINI = vit.ViTConfig(img_size=56, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5)  # 14 x 14, as at 224


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b|; refuses shapes that would broadcast, and all-zero references."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    scale = theirs.abs().max().item()
    assert scale > 0
    return (ours.double() - theirs.double()).abs().max().item() / scale


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with values that matter: a fresh model's zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.ndim == 1 and name.endswith(("weight", "gamma", "scale1", "scale2"))
        parameter.copy_(1 + 0.2 * values if is_scale else values * (0.5 if parameter.ndim == 3 else 0.06))
    return model


def timm_twin(config: vit.ViTConfig) -> nn.Module:
    """timm's model of the same architecture, with random non-trivial weights, in eval mode."""
    with torch.device("meta"):  # drawing weights that are replaced at once takes longer than the tests do
        model = timm_model(config)
    return randomize(model.to_empty(device="cpu")).eval()


def ours_from(twin: nn.Module, config: vit.ViTConfig) -> vit.ViT:
    """Our model with the weights of timm's, through the key map."""
    converted = vit.weights.convert(twin.state_dict(), "timm", "vit", config)
    with torch.device("meta"):
        model = vit.ViT(converted.config)
    model.load_state_dict({name: tensor.clone() for name, tensor in converted.state_dict.items()}, assign=True)
    return model.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    """Normal noise [B, C, H, W]."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operations(call: Callable[[], object]) -> dict[str, int]:
    """What PyTorch ran -> how often."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key: event.count for event in profiler.key_averages()}


def pixels(grid: tuple[int, int], count: int = 1, p: int = 4, seed: int = 1) -> Tensor:
    """Noise that gives this grid of patches of side p."""
    return images(count, 3, grid[0] * p, grid[1] * p, seed=seed)


def refused_in_one_line(call: Callable[[], object], message: str) -> None:
    """`call` raises a ValueError whose text matches and is one line."""
    import pytest  # which scripts that use the rest of this file may lack

    with pytest.raises(ValueError) as error:
        call()
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
