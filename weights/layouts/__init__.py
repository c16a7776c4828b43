"""The known layouts: a file for each family of projects, which lists its own in `LAYOUTS`."""

from vit.checks import unknown

from ..keymap import Layout
from . import google, timm, torchvision, transformers, vit

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for family in (vit, timm, transformers, torchvision, google) for layout in family.LAYOUTS
}


def get_layout(name: str) -> Layout:
    """The layout of that name; ValueError for an unknown one."""
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(unknown("layout", name, sorted(LAYOUTS)))
    return LAYOUTS[name]
