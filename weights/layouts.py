"""The layouts that are known, by name and by their keys."""

from collections.abc import Iterable

from vit.checks import unknown

from .files import CheckpointError
from .keymap import Layout
from .own import VIT
from .timm import TIMM

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (VIT, TIMM)}


def get_layout(name: str) -> Layout:
    """The layout of that name; ValueError for an unknown one."""
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(unknown("layout", name, sorted(LAYOUTS)))
    return LAYOUTS[name]


def detect_layout(state_dict: Iterable[str]) -> str:
    """The name of the layout whose marker keys a state dict (or its keys) holds.

    Raises:
        CheckpointError: no layout's, or those of several.
    """
    keys = set(state_dict)
    found = [layout.name for layout in LAYOUTS.values() if keys.issuperset(layout.markers)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"the keys fit several layouts: {', '.join(found)}; say which one it is")
    wanted = ", ".join(f"{layout.name} ({', '.join(layout.markers)})" for layout in LAYOUTS.values())
    some = ", ".join(sorted(keys)[:3]) or "no keys at all"
    raise CheckpointError(f"unknown layout: expected the marker keys of {wanted}; found {some} ...")
