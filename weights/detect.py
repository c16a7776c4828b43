"""Which layout is it, and under which names does it lie? Told by marker keys, never guessed."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .checkpoint import CheckpointError
from .keymap import Layout, sort_keys
from .layouts import LAYOUTS, get_layout
from .layouts.timm import without_chunk

# What training scripts put around a model's weights. Of several that hold the same model, the first here is taken.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "encoder", "target")
_FLAX_CONTAINERS = ("opt/target/params/", "opt/target/", "params/img/", "params/")
# What wrappers in PyTorch put before every name.
_STRIPPED = ("module", "_orig_mod", "backbone")
_WRAPPER = re.compile(rf"((?:{'|'.join((*_CONTAINERS, *_STRIPPED))})\.)*|{'|'.join(_FLAX_CONTAINERS)}")

_MOST = 100  # models of one layout in one file: more are no model's

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
# And parts of names that show it.
_REFUSED_PARTS = {
    "patch_embed.backbone.": "a hybrid with a convolutional stem, which this model has not",
    "patch_embeddings.backbone.": "a hybrid with a convolutional stem, which this model has not",
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
    lacks: tuple[str, ...] | None = None  # the marker keys that a layout stated by the caller lacks; None: it was found
    others: tuple[str, ...] = ()  # wrappers of other models, which were passed over

    @property
    def container(self) -> str:
        """The part of the wrapper beyond which lies what is no part of the model: an optimiser, another model."""
        if "/" in self.wrapper:
            return self.wrapper
        parts = self.wrapper.split(".")[:-1]
        last = max((i for i, part in enumerate(parts) if part in _CONTAINERS), default=-1)
        return "".join(f"{part}." for part in parts[: last + 1])

    @property
    def front(self) -> str:
        """What stands before the names of all but the classifier."""
        return self.wrapper + (self.layout.prefix if self.prefixed else "")


def detect_layout(state_dict: Iterable[str], prefix: str | None = None) -> Detected:
    """The layout of a state dict (or of its keys), with what decided in `.why`.

    Args:
        state_dict: the keys.
        prefix: look only at keys that begin so.

    Raises:
        CheckpointError: no layout's marker keys are there, those of several, or a model that this one cannot be.
    """
    keys = list(state_dict)
    prefix = whole_prefix(keys, prefix) if prefix else ""
    place = locate([key[len(prefix) :] for key in keys if key.startswith(prefix)])
    detected = Detected(place.layout.name)
    detected.why, detected.prefix = explain(place), prefix + place.wrapper
    return detected


def whole_prefix(keys: Iterable[str], prefix: str) -> str:
    """The prefix that the caller states, with the one known wrapper before it where no key begins with it itself.

    Raises:
        CheckpointError: no key begins so, or keys behind several wrappers do: it names them.
    """
    keys = list(keys)
    if any(key.startswith(prefix) for key in keys):
        return prefix
    before = {key[: key.find(prefix)] for key in keys if prefix in key}
    before = {text for text in before if text[-1] in "./"}  # "mybackbone." ends so as well
    known = sorted(text for text in before if _WRAPPER.fullmatch(text))
    if len(known) == 1:
        return known[0] + prefix
    wholes = " or ".join(f"--prefix {text + prefix!r}" for text in (known or sorted(before))[:3])
    some = ", ".join(sorted(keys)[:3]) or "none"
    hint = f"did you mean {wholes}?" if wholes else f"the first keys are {some}"
    raise CheckpointError(f"no key begins with the prefix {prefix!r}; {hint}")


def explain(place: Place) -> str:
    """How the layout was told: the marker keys, in words, or the caller."""
    if place.lacks is not None:
        return "stated by the caller" + (f", and it lacks {' and '.join(place.lacks)}" if place.lacks else "")
    others = place.layout.absent
    absent = (
        f", and nothing of another layout's ({', '.join(others[:3])}{' ...' * (len(others) > 3)})" if others else ""
    )
    under = f" under {place.wrapper}" if place.wrapper else ""
    return f"it has {' and '.join(place.layout.markers)}{under}{absent}"


def locate(keys: Iterable[str], layout: str | None = None) -> Place:
    """The one layout that the keys are of, and its place among them; with `layout` only its place is asked for."""
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
            raise CheckpointError(f"the keys fit several layouts: {', '.join(names)}; say which one it is")
        place = min(known, key=lambda place: (len(place.wrapper), place.wrapper))
        return replace(place, others=tuple(sorted(wrappers - {place.wrapper})))
    if layout is not None:  # the caller knows; what is missing will be listed
        return _stated_place(asked[0], index)
    if places:
        where = sorted({place.wrapper for place in places})
        several = f" and {len(where) - 3} more" * (len(where) > 3)
        found = f"a model in the {places[0].layout.name} layout lies under {' and under '.join(map(repr, where[:3]))}"
        raise CheckpointError(f"{found}{several}: state it, prefix={where[0]!r}")
    raise CheckpointError(_nearest(index))


def _stated_place(layout: Layout, index: list[str]) -> Place:
    """Where a layout lies whose marker keys are not all there, told by any wrapper before its class token."""
    (token,) = (entry.theirs[0] for entry in layout.entries if entry.ours == "class_token")
    for prefixed in (True, False) if layout.prefix else (False,):
        end = layout.prefix * prefixed + token
        wrappers = [key.removesuffix(end) for key in index if key.endswith(end)]
        places = [Place(layout, wrapper, prefixed) for wrapper in wrappers if _WRAPPER.fullmatch(wrapper)]
        if places:
            return min(places, key=lambda place: (_container_rank(place), len(place.wrapper)))
    return Place(layout, "", bool(layout.prefix) and any(key.startswith(layout.prefix) for key in index))


def _container_rank(place: Place) -> int:
    """Where its container stands among those that training scripts write; -1 without one."""
    return min((_CONTAINERS.index(part) for part in place.wrapper.split(".") if part in _CONTAINERS), default=-1)


def _places(layout: Layout, index: list[str]) -> list[Place]:
    """Where among the keys, sorted, all of a layout's markers lie, and none that tell another layout."""
    first, *others = layout.markers
    found = []
    for key in (key for key in index if key.endswith(first)):
        before = key.removesuffix(first)
        prefixed = bool(layout.prefix) and before.endswith(layout.prefix)
        place = Place(layout, before.removesuffix(layout.prefix) if prefixed else before, prefixed)
        if place.wrapper and place.wrapper[-1] not in "./":
            continue  # "myblocks.0..." ends so as well
        fronts = {place.wrapper, place.container, place.front}
        complete = all(_begins(index, place.wrapper + o, True) or _begins(index, place.front + o, True) for o in others)
        if complete and not any(_begins(index, front + other) for other in layout.absent for front in fronts):
            found.append(place)
        if len(found) > _MOST:
            raise CheckpointError(f"there are more than {_MOST} models in the {layout.name} layout: state a prefix")
    return found


def _missing_markers(place: Place, index: list[str]) -> tuple[str, ...]:
    fronts = (place.wrapper, place.front)
    return tuple(
        marker for marker in place.layout.markers if not any(_begins(index, front + marker, True) for front in fronts)
    )


def _begins(index: list[str], text: str, whole: bool = False) -> bool:
    """Does any of the sorted keys begin so, or, with `whole`, read so?"""
    i = bisect_left(index, text)
    return i < len(index) and (index[i] == text if whole else index[i].startswith(text))


def _refuse(keys: list[str]) -> None:
    for marker, why in _REFUSED.items():
        for key in keys:
            if key == marker or key.endswith(f".{marker}"):
                raise CheckpointError(f"{key} shows {why}: this model cannot hold it")
    for part, why in _REFUSED_PARTS.items():
        for key in keys:
            if key.startswith(part) or f".{part}" in key:
                raise CheckpointError(f"{key} shows {why}")


def _nearest(keys: list[str]) -> str:
    """The error for keys that are no layout's: which one they come nearest to, and what it lacks."""
    if not keys:
        return "unknown layout: there are no keys at all"
    some = keys[:2000]  # enough to tell, and quick however many there are
    known = {name: len(sort_keys(layout, some, bool(layout.prefix)).groups) for name, layout in LAYOUTS.items()}
    best = max(known, key=lambda name: known[name])
    if known[best] == 0:
        known_markers = sorted({layout.markers[0] for layout in LAYOUTS.values()})
        return f"unknown layout: found {', '.join(some[:3])} ..., expected one of {', '.join(known_markers)}"
    markers = ", ".join(LAYOUTS[best].markers)
    return f"unknown layout: it comes nearest to {best}, but expected its marker keys {markers}"
