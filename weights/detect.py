"""Which layout is it, and under which names does it lie? Told by marker keys, never guessed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from .checkpoint import CheckpointError
from .keymap import Layout, sort_keys
from .layouts import LAYOUTS, get_layout

# What training scripts put around a model's weights. Of several that hold the same model, the first here is taken.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "encoder", "target")
_FLAX_CONTAINERS = ("opt/target/params/", "opt/target/", "params/img/", "params/")
# What wrappers in PyTorch put before every name.
_STRIPPED = ("module", "_orig_mod", "backbone")
_WRAPPER = re.compile(rf"((?:{'|'.join((*_CONTAINERS, *_STRIPPED))})\.)*|{'|'.join(_FLAX_CONTAINERS)}")

# Models that resemble a ViT and cannot be one here: a key that shows it -> why.
_REFUSED = {
    "transformer.layers.0.0.to_qkv.weight": "vit-pytorch's ViT (lucidrains), whose qkv layers have no bias and whose "
    "patches have norms of their own",
    "class_embedding": "CLIP's tower, which has a norm before its blocks",
    "embeddings.class_embedding": "CLIP's tower, which has a norm before its blocks",
    "norm_pre.weight": "a ViT with a norm before its blocks, as CLIP's towers have",
    "blocks.0.attn.rel_pos_h": "SAM's image encoder, whose attention has relative positions",
    "layers.0.attn.rel_pos_h": "SAM's image encoder, whose attention has relative positions",
    "blocks.0.attn.relative_position_bias_table": "a model with relative positions, as BEiT and Swin have",
    "blocks.0.attn.q_bias": "BEiT or EVA, whose attention has relative or rotary positions",
    "rope_embed.periods": "DINOv3, which has rotary positions",
}


class Detected(str):
    """A layout's name that also tells how it was found.

    Attributes:
        why: the marker keys that decided, in words.
        prefix: what stands before the layout's own names in every key of the model ("teacher.backbone.").
    """

    why: str
    prefix: str


@dataclass(frozen=True)
class Place:
    """A layout found under a prefix."""

    layout: Layout
    wrapper: str  # what stands before the layout's own names
    prefixed: bool  # do these begin with the layout's own prefix?

    @property
    def container(self) -> str:
        """The part of the wrapper beyond which lies what is no part of the model: an optimiser, another model."""
        if "/" in self.wrapper:
            return self.wrapper
        parts = self.wrapper.split(".")[:-1]
        last = max((i for i, part in enumerate(parts) if part in _CONTAINERS), default=-1)
        return "".join(f"{part}." for part in parts[: last + 1])

    def has(self, keys: set[str], key: str) -> bool:
        return self.wrapper + (self.layout.prefix if self.prefixed else "") + key in keys or self.wrapper + key in keys

    def markers(self) -> list[str]:
        in_front = self.wrapper + (self.layout.prefix if self.prefixed else "")
        return [in_front + self.layout.markers[0], *self.layout.markers[1:]]


def detect_layout(state_dict: Iterable[str], prefix: str | None = None) -> Detected:
    """The layout of a state dict (or of its keys), with what decided in `.why`.

    Args:
        state_dict: the keys.
        prefix: look only at keys that begin so.

    Raises:
        CheckpointError: no layout's marker keys are there, those of several, or a model that this one cannot be.
    """
    keys = list(state_dict)
    place = locate(keys if prefix is None else [key[len(prefix) :] for key in keys if key.startswith(prefix)])
    detected = Detected(place.layout.name)
    detected.why, detected.prefix = explain(place), (prefix or "") + place.wrapper
    return detected


def explain(place: Place) -> str:
    """The marker keys, in words."""
    others = place.layout.absent
    absent = (
        f", and nothing of another layout's ({', '.join(others[:3])}{' ...' * (len(others) > 3)})" if others else ""
    )
    under = f" under {place.wrapper}" if place.wrapper else ""
    return f"it has {' and '.join(place.layout.markers)}{under}{absent}"


def locate(keys: Iterable[str], layout: str | None = None) -> Place:
    """The one layout that the keys are of, and its place among them; with `layout` only its place is asked for."""
    keys = set(keys)
    _refuse(keys)
    asked = list(LAYOUTS.values()) if layout is None else [get_layout(layout)]
    places = [place for one in asked for place in _places(one, keys)]
    known = [place for place in places if _WRAPPER.fullmatch(place.wrapper)]
    if known:
        best = min(map(_container_rank, known))
        known = [place for place in known if _container_rank(place) == best]
        names = sorted({place.layout.name for place in known})
        if len(names) > 1:
            raise CheckpointError(f"the keys fit several layouts: {', '.join(names)}; say which one it is")
        return min(known, key=lambda place: (len(place.wrapper), place.wrapper))
    if places:
        where = sorted({place.wrapper for place in places})
        found = f"a model in the {places[0].layout.name} layout lies under {' and under '.join(map(repr, where))}"
        raise CheckpointError(f"{found}: state it, prefix={where[0]!r}")
    if layout is not None:  # the caller knows; what is missing will be listed
        one = asked[0]
        return Place(one, "", bool(one.prefix) and any(key.startswith(one.prefix) for key in keys))
    raise CheckpointError(_nearest(keys))


def _container_rank(place: Place) -> int:
    """Where its container stands among those that training scripts write; -1 without one."""
    return min((_CONTAINERS.index(part) for part in place.wrapper.split(".") if part in _CONTAINERS), default=-1)


def _places(layout: Layout, keys: set[str]) -> list[Place]:
    """Where among the keys all of a layout's markers lie, and none that tell another layout."""
    first, *others = layout.markers
    found = []
    for key in keys:
        if not key.endswith(first):
            continue
        before = key.removesuffix(first)
        prefixed = bool(layout.prefix) and before.endswith(layout.prefix)
        place = Place(layout, before.removesuffix(layout.prefix) if prefixed else before, prefixed)
        if place.wrapper and place.wrapper[-1] not in "./":
            continue  # "myblocks.0..." ends so as well
        if all(place.has(keys, marker) for marker in others) and not _has_any(place, keys):
            found.append(place)
    return found


def _has_any(place: Place, keys: set[str]) -> bool:
    """Does any key tell that this is another layout?"""
    fronts = {place.wrapper, place.container, place.wrapper + (place.layout.prefix if place.prefixed else "")}
    return any(key.startswith(front + other) for other in place.layout.absent for front in fronts for key in keys)


def _refuse(keys: set[str]) -> None:
    for marker, why in _REFUSED.items():
        for key in keys:
            if key == marker or key.endswith(f".{marker}"):
                raise CheckpointError(f"{key} shows {why}: this model cannot hold it")


def _nearest(keys: set[str]) -> str:
    """The error for keys that are no layout's: which one they come nearest to, and what it lacks."""
    if not keys:
        return "unknown layout: there are no keys at all"
    some = sorted(islice(keys, 2000))  # enough to tell, and quick however many there are
    known = {name: len(sort_keys(layout, some, bool(layout.prefix)).groups) for name, layout in LAYOUTS.items()}
    best = max(known, key=lambda name: known[name])
    if known[best] == 0:
        known_markers = sorted({layout.markers[0] for layout in LAYOUTS.values()})
        return f"unknown layout: found {', '.join(some[:3])} ..., expected one of {', '.join(known_markers)}"
    markers = ", ".join(LAYOUTS[best].markers)
    return f"unknown layout: it comes nearest to {best}, but expected its marker keys {markers}"
