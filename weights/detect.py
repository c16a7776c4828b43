"""Detection of a state dict's layout and of the wrapper around it, by marker keys and never by a guess."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .checkpoint import CheckpointError
from .keymap import Layout, sort_keys
from .layouts import LAYOUTS, get_layout
from .layouts.timm import without_chunk

# What training scripts put around a model's weights. If several of them hold a model, the first one here is read.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "encoder", "target")
_FLAX_CONTAINERS = ("opt/target/params/", "opt/target/", "params/img/", "params/")
# What PyTorch's wrappers put before every name.
_STRIPPED = ("module", "_orig_mod", "backbone")
_WRAPPER = re.compile(rf"((?:{'|'.join((*_CONTAINERS, *_STRIPPED))})\.)*|{'|'.join(_FLAX_CONTAINERS)}")

_MOST = 100  # models of one layout in one file; a file with more is damaged or hostile

# Models that resemble a ViT but cannot be loaded: a key that only they have -> why.
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
# The same by parts of keys.
_REFUSED_PARTS = {
    "patch_embed.backbone.": "a hybrid with a convolutional stem, which this model lacks",
    "patch_embeddings.backbone.": "a hybrid with a convolutional stem, which this model lacks",
}


class Detected(str):
    """A layout's name, and how it was detected.

    Attributes:
        why: the marker keys that decided, in words.
        prefix: what precedes the layout's own names in every key of the model ("teacher.backbone.").
    """

    why: str
    prefix: str


@dataclass(frozen=True)
class Place:
    """A layout detected behind a wrapper."""

    layout: Layout
    wrapper: str  # what precedes the layout's own names
    prefixed: bool  # these names begin with the layout's own prefix
    lacks: tuple[str, ...] | None = None  # missing marker keys of a layout that the caller stated; None: detected
    others: tuple[str, ...] = ()  # wrappers of other models in the file, which are not read

    @property
    def container(self) -> str:
        """The first part of the wrapper: keys outside it do not belong to the model (an optimizer, another model)."""
        if "/" in self.wrapper:
            return self.wrapper
        parts = self.wrapper.split(".")[:-1]
        last = max((i for i, part in enumerate(parts) if part in _CONTAINERS), default=-1)
        return "".join(f"{part}." for part in parts[: last + 1])

    @property
    def front(self) -> str:
        """What precedes all names except the classifier's."""
        return self.wrapper + (self.layout.naming.prefix if self.prefixed else "")


def detect_layout(state_dict: Iterable[str], prefix: str | None = None) -> Detected:
    """The layout of a state dict (or of its keys); `.why` says what decided.

    Args:
        state_dict: the keys.
        prefix: look only at keys that begin with it.

    Raises:
        CheckpointError: it has the marker keys of no layout or of several, or is a model that cannot be loaded.
    """
    keys = list(state_dict)
    prefix = whole_prefix(keys, prefix) if prefix else ""
    place = locate([key[len(prefix) :] for key in keys if key.startswith(prefix)])
    detected = Detected(place.layout.name)
    detected.why, detected.prefix = explain(place), prefix + place.wrapper
    return detected


def whole_prefix(keys: Iterable[str], prefix: str) -> str:
    """The prefix that the caller states, preceded by a known wrapper if keys begin with it only behind that.

    Raises:
        CheckpointError: no key begins with the prefix, or keys behind several wrappers do.
    """
    keys = list(keys)
    if any(key.startswith(prefix) for key in keys):
        return prefix
    before = {key[: key.find(prefix)] for key in keys if prefix in key}
    before = {text for text in before if text[-1] in "./"}  # not "my", the start of "mybackbone."
    known = sorted(text for text in before if _WRAPPER.fullmatch(text))
    if len(known) == 1:
        return known[0] + prefix
    wholes = " or ".join(f"--prefix {text + prefix!r}" for text in (known or sorted(before))[:3])
    some = ", ".join(sorted(keys)[:3]) or "none"
    hint = f"did you mean {wholes}?" if wholes else f"the first keys are {some}"
    raise CheckpointError(f"no key begins with the prefix {prefix!r}; {hint}")


def explain(place: Place) -> str:
    """How the layout was detected: the marker keys, in words, or the caller's statement."""
    if place.lacks is not None:
        return "stated by the caller" + (f", and it lacks {' and '.join(place.lacks)}" if place.lacks else "")
    others = place.layout.detection.absent
    absent = f", and no key of another layout ({', '.join(others[:3])}{' ...' * (len(others) > 3)})" if others else ""
    under = f" under {place.wrapper}" if place.wrapper else ""
    return f"it has {' and '.join(place.layout.detection.markers)}{under}{absent}"


def locate(keys: Iterable[str], layout: str | None = None) -> Place:
    """The layout of some keys, and where among them it is; `layout` states it, so that only the place is looked for."""
    index = sorted({without_chunk(key) for key in keys})
    _refuse(index)
    place = _locate(index, layout)
    return place if layout is None else replace(place, lacks=_missing_markers(place, index))


def _locate(index: list[str], layout: str | None) -> Place:
    asked = list(LAYOUTS.values()) if layout is None else [get_layout(layout)]
    places = [place for one in asked for place in _places(one, index)]
    known = [place for place in places if _WRAPPER.fullmatch(place.wrapper)]
    if known:
        wrappers = {place.wrapper for place in known}
        best = min(map(_container_rank, known))
        known = [place for place in known if _container_rank(place) == best]
        names = sorted({place.layout.name for place in known})
        if len(names) > 1:
            raise CheckpointError(f"the keys fit several layouts: {', '.join(names)}; state which one it is")
        place = min(known, key=lambda place: (len(place.wrapper), place.wrapper))
        return replace(place, others=tuple(sorted(wrappers - {place.wrapper})))
    if layout is not None:  # stated by the caller; missing keys are listed later
        return _stated_place(asked[0], index)
    if places:
        where = sorted({place.wrapper for place in places})
        several = f" and {len(where) - 3} more" * (len(where) > 3)
        found = f"there is a model in the {places[0].layout.name} layout under {' and '.join(map(repr, where[:3]))}"
        raise CheckpointError(f"{found}{several}: state it, prefix={where[0]!r}")
    raise CheckpointError(_nearest(index))


def _stated_place(layout: Layout, index: list[str]) -> Place:
    """The place of a layout that lacks some marker keys, by any known wrapper before its class token."""
    (token,) = (entry.theirs[0] for entry in layout.entries if entry.ours == "class_token")
    prefix = layout.naming.prefix
    for prefixed in (True, False) if prefix else (False,):
        end = prefix * prefixed + token
        wrappers = [key.removesuffix(end) for key in index if key.endswith(end)]
        places = [Place(layout, wrapper, prefixed) for wrapper in wrappers if _WRAPPER.fullmatch(wrapper)]
        if places:
            return min(places, key=lambda place: (_container_rank(place), len(place.wrapper)))
    return Place(layout, "", bool(prefix) and any(key.startswith(prefix) for key in index))


def _container_rank(place: Place) -> int:
    """The position of its container in `_CONTAINERS`; -1 without one."""
    return min((_CONTAINERS.index(part) for part in place.wrapper.split(".") if part in _CONTAINERS), default=-1)


def _places(layout: Layout, index: list[str]) -> list[Place]:
    """Where among the sorted keys there are all of a layout's markers and none that must be absent."""
    prefix, absent, (first, *others) = layout.naming.prefix, layout.detection.absent, layout.detection.markers
    found = []
    for key in (key for key in index if key.endswith(first)):
        before = key.removesuffix(first)
        prefixed = bool(prefix) and before.endswith(prefix)
        place = Place(layout, before.removesuffix(prefix) if prefixed else before, prefixed)
        if place.wrapper and place.wrapper[-1] not in "./":
            continue  # "myblocks.0..."
        fronts = {place.wrapper, place.container, place.front}
        complete = all(_begins(index, place.wrapper + o, True) or _begins(index, place.front + o, True) for o in others)
        if complete and not any(_begins(index, front + other) for other in absent for front in fronts):
            found.append(place)
        if len(found) > _MOST:
            raise CheckpointError(f"there are more than {_MOST} models in the {layout.name} layout: state a prefix")
    return found


def _missing_markers(place: Place, index: list[str]) -> tuple[str, ...]:
    fronts, markers = (place.wrapper, place.front), place.layout.detection.markers
    return tuple(marker for marker in markers if not any(_begins(index, front + marker, True) for front in fronts))


def _begins(index: list[str], text: str, whole: bool = False) -> bool:
    """Whether any of the sorted keys begins with `text`, or with `whole` is equal to it."""
    i = bisect_left(index, text)
    return i < len(index) and (index[i] == text if whole else index[i].startswith(text))


def _refuse(keys: list[str]) -> None:
    for marker, why in _REFUSED.items():
        for key in keys:
            if key == marker or key.endswith(f".{marker}"):
                raise CheckpointError(f"{key} belongs to {why}: it cannot be loaded")
    for part, why in _REFUSED_PARTS.items():
        for key in keys:
            if key.startswith(part) or f".{part}" in key:
                raise CheckpointError(f"{key} belongs to {why}: it cannot be loaded")


def _nearest(keys: list[str]) -> str:
    """The error text for an unknown layout: the nearest known one, and which marker keys were expected."""
    if not keys:
        return "unknown layout: there are no keys"
    some = keys[:2000]  # enough, and fast for any number of keys
    known = {name: len(sort_keys(layout, some, bool(layout.naming.prefix)).groups) for name, layout in LAYOUTS.items()}
    best = max(known, key=lambda name: known[name])
    if known[best] == 0:
        known_markers = sorted({layout.detection.markers[0] for layout in LAYOUTS.values()})
        return f"unknown layout: found {', '.join(some[:3])} ..., expected one of {', '.join(known_markers)}"
    markers = ", ".join(LAYOUTS[best].detection.markers)
    return f"unknown layout: the nearest is {best}, which has the keys {markers}"
