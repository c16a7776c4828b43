"""The layouts that are known: a file per family, each a table."""

from vit.checks import unknown

from ..keymap import Layout
from .google import AUGREG, BIG_VISION, BIG_VISION_SCANNED
from .timm import DEIT, DEIT3, DINO, DINOV2, MAE, MOCO, TIMM
from .torchvision import TORCHVISION, TORCHVISION_OLD
from .transformers import TRANSFORMERS
from .vit import VIT

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        VIT, TIMM, DEIT, DEIT3, DINO, DINOV2, MAE, MOCO, *TRANSFORMERS, TORCHVISION, TORCHVISION_OLD, AUGREG,
        BIG_VISION, BIG_VISION_SCANNED,
    )
}  # fmt: skip


def get_layout(name: str) -> Layout:
    """The layout of that name; ValueError for an unknown one."""
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(unknown("layout", name, sorted(LAYOUTS)))
    return LAYOUTS[name]
