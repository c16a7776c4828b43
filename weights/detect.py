"""Detection of a state dict's layout and of the wrapper around it, by marker keys and never by a guess."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from .checkpoint import CheckpointError, NotATensor
from .keymap import Layout, sort_keys
from .layouts import LAYOUTS, get_layout
from .layouts.timm import without_chunk
from .refused import refuse

# What training scripts put around a model's weights. Of several models of the same shapes the one is read whose
# container is the first of these, where their containers differ: moving averages and teachers before what is trained.
_CONTAINERS = (
    "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "swa_model", "teacher",
    "state_dict", "model", "current_model_state", "student", "encoder", "target",
)  # fmt: skip
_FLAX_CONTAINERS = ("opt/target/params/", "opt/target/", "params/img/", "params/")
# What wrappers of PyTorch, timm and transformers put before every name.
_STRIPPED = ("module", "_orig_mod", "backbone", "timm_model")
# What keeps moving averages: the names of its counts and settings, beside the model or among its parameters.
BOOKKEEPING = ("n_averaged", "num_updates", "updates", "steps", "step", "initted", "decay")
_WRAPPER = re.compile(rf"((?:{'|'.join((*_CONTAINERS, *_STRIPPED))})\.)*|{'|'.join(_FLAX_CONTAINERS)}")

# An optimizer's moments have the names and shapes of the weights.
_OPTIMIZER = re.compile(r"(.*[./])?(opt|optim|optimizers?|adamw?)(_states?|_state_dicts?)?[./].*")

# How the keys of a block begin in any layout, behind whatever wrapper: blocks.3.attn.qkv., blocks.3.norm1.
_BLOCKS = {
    re.escape(re.sub("[./][a-z]*$", "", name)).replace(r"\{\}", "[0-9]+")
    for layout in LAYOUTS.values()
    for entry in layout.entries
    if entry.ours in ("blocks.{}.attention.qkv.weight", "blocks.{}.norm1.weight")
    for name in entry.theirs
}
_BLOCK = re.compile(rf"((?:.*?[./])?)(?:{'|'.join(sorted(_BLOCKS))})[./]")

_MOST = 100  # models of one layout in one file; a file with more is damaged or hostile


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
    others: tuple[str, ...] = ()  # wrappers of other models of the same shapes in the file, which are not read

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

    @property
    def known(self) -> bool:
        """Whether the wrapper consists of known parts only."""
        return _WRAPPER.fullmatch(self.wrapper) is not None

    @property
    def rank(self) -> tuple[int, ...]:
        """The positions of its parts in `_CONTAINERS`: compared from the left, the first difference decides."""
        return _rank(self.wrapper)

    @property
    def fronts(self) -> set[str]:
        """What may precede a key of the same model: the container, and each longer beginning of `front`."""
        ends = [i + 1 for i, c in enumerate(self.wrapper) if c == "." and i >= len(self.container)]
        return {self.container, self.front, self.wrapper, *(self.wrapper[:end] for end in ends)}


def _rank(wrapper: str) -> tuple[int, ...]:
    return tuple(_CONTAINERS.index(part) for part in wrapper.split(".") if part in _CONTAINERS)


def detect_layout(state_dict: Iterable[str], prefix: str | None = None) -> Detected:
    """The layout of a state dict (or of its keys); `.why` says what decided.

    Args:
        state_dict: the weights; of keys alone, models of different shapes cannot be told apart.
        prefix: look only at keys that begin with it.

    Raises:
        CheckpointError: it has the marker keys of no layout or of several, or is a model that cannot be loaded, or
            holds several models of which none is known to be meant.
    """
    state = state_dict if isinstance(state_dict, Mapping) else dict.fromkeys(state_dict)
    prefix = whole_prefix(state, prefix) if prefix else ""
    place = locate({key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}, None, prefix)
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


def choices(prefixes: Iterable[str]) -> str:
    """What to state in order to take one of several models: `prefix='student.' or ...`, for a message."""
    known = sorted(prefix for prefix in prefixes if prefix)
    several = f" or one of {len(known) - 8} more" * (len(known) > 8)
    return " or ".join(f"prefix={prefix!r}" for prefix in known[:8]) + several + " (--prefix on the command line)"


def locate(state: Mapping[str, Any], layout: str | None = None, prefix: str = "") -> Place:
    """The layout of a state dict, and where in it the model is.

    Args:
        state: the weights, by key; their shapes tell models apart, values without a shape do not.
        layout: states the layout, so that only the place is looked for.
        prefix: what precedes these keys in the file, for messages.
    """
    shapes = {without_chunk(key): getattr(value, "shape", None) for key, value in state.items()}
    index = sorted(shapes)
    refuse(index)
    asked = list(LAYOUTS.values()) if layout is None else [get_layout(layout)]
    places = [place for one in asked for place in _places(one, index)]
    if layout is not None and not places:
        places = _places_without_markers(asked[0], index)
    if not places and layout is None:
        raise CheckpointError(_nearest(index))
    place = _choose(places, index, shapes, prefix) if places else _nowhere(asked[0], index)
    _refuse_second_best(place, state, index, prefix)
    return place if layout is None else replace(place, lacks=_missing_markers(place, index))


def _choose(places: list[Place], index: list[str], shapes: Mapping[str, Any], prefix: str) -> Place:
    """The model to read: the only one, or of several with the same shapes the one whose containers rank first."""
    whole = [place for place in places if _is_whole(place, index) and (place.known or not _is_moments(place))]
    found = whole or [place for place in places if place.known] or places
    wrappers = sorted({place.wrapper for place in found})
    where = [prefix + wrapper for wrapper in wrappers]
    if len(wrappers) == 1 and not found[0].known:
        name = found[0].layout.name
        raise CheckpointError(f"there is a model in the {name} layout under {where[0]!r}: state it, {choices(where)}")
    first = min(found, key=lambda place: place.rank)
    if len(wrappers) > 1:
        best = {place.wrapper for place in found if place.rank == first.rank}
        if not all(place.known for place in found) or len(best) > 1:
            why = ", and their names do not tell which one is meant"
        elif any(wrapper.startswith(first.container) for wrapper in wrappers if wrapper != first.wrapper):
            why = ", one among the weights of another"
        else:
            why = "" if _are_alike([_shapes(place, index, shapes) for place in found]) else " of different shapes"
        if why:
            raise CheckpointError(f"there are {len(wrappers)} models{why}: state one, {choices(where)}")
    names = sorted({place.layout.name for place in found if place.wrapper == first.wrapper})
    if len(names) > 1:
        raise CheckpointError(f"the keys fit several layouts: {', '.join(names)}; state which one it is")
    return replace(first, others=tuple(wrapper for wrapper in wrappers if wrapper != first.wrapper))


def _refuse_second_best(place: Place, state: Mapping[str, Any], index: list[str], prefix: str) -> None:
    """CheckpointError if a container that ranks before the chosen model's holds one that cannot be read.

    A moving average of the trained parameters alone lacks the fixed ones, and a module that was saved whole is an
    object: to read what was trained instead would be to read another model than was asked for.
    """
    alike = {found[1] for found in map(_BLOCK.match, index) if found and not _OPTIMIZER.fullmatch(found[1])}
    objects = {f"{key}." for key, value in state.items() if isinstance(value, NotATensor) and not value.plain}
    better = sorted(
        wrapper
        for wrapper in alike | {wrapper for wrapper in objects if _WRAPPER.fullmatch(wrapper)}
        if _comes_before(_rank(wrapper), place.rank) and not wrapper.startswith(place.wrapper)
    )
    if better:
        what = f"{prefix + better[0]!r} comes before {prefix + place.wrapper!r}, but cannot be read as a ViT"
        possible = [prefix + wrapper for wrapper in (place.wrapper, *better) if wrapper not in objects]
        raise CheckpointError(f"there are several models: {what}: state one, {choices(possible)}")


def _comes_before(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the first container that differs ranks before the other's; one that has fewer may be around it."""
    return next((a < b for a, b in zip(one, other) if a != b), False)


def _is_whole(place: Place, index: list[str]) -> bool:
    """Whether there is a ViT and not just something with blocks alike, as a decoder or the tower of a text."""
    theirs = {entry.ours: entry.theirs[0] for entry in place.layout.entries}
    parts = ("class_token", "position_embedding", "patch_embed.proj.weight")
    return all(_begins(index, place.front + theirs[ours], True) for ours in parts)


def _is_moments(place: Place) -> bool:
    return _OPTIMIZER.fullmatch(place.wrapper) is not None


def _shapes(place: Place, index: list[str], shapes: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The shapes of a model's weights, by our names."""
    start = bisect_left(index, place.wrapper)
    keys = [key[len(place.wrapper) :] for key in takewhile(lambda key: key.startswith(place.wrapper), index[start:])]
    groups = sort_keys(place.layout, keys, place.prefixed).groups
    return {ours: [shapes.get(place.wrapper + key) for key in group] for ours, (_, group) in groups.items()}


def _are_alike(models: list[dict[str, list[Any]]]) -> bool:
    """Whether all have the same weights in the same shapes. Some may lack a classifier."""
    first = models[0]
    return all(
        first.get(name) == model.get(name)
        for model in models[1:]
        for name in first.keys() | model.keys()
        if not name.startswith("head") or (name in first and name in model)
    )


def _places_without_markers(layout: Layout, index: list[str]) -> list[Place]:
    """The known places of a layout that lacks some marker keys: wherever its class token is."""
    (token,) = (entry.theirs[0] for entry in layout.entries if entry.ours == "class_token")
    prefix = layout.naming.prefix
    for prefixed in (True, False) if prefix else (False,):
        end = prefix * prefixed + token
        places = [Place(layout, key.removesuffix(end), prefixed) for key in index if key.endswith(end)]
        if known := [place for place in places if place.known]:
            return known
    return []


def _nowhere(layout: Layout, index: list[str]) -> Place:
    """The whole state dict, for an error that lists what a stated layout lacks."""
    prefix = layout.naming.prefix
    return Place(layout, "", bool(prefix) and any(key.startswith(prefix) for key in index))


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
        if all(_has(index, place, other) for other in others) and not any(
            _begins(index, front + other) for other in absent for front in place.fronts
        ):
            found.append(place)
        if len(found) > _MOST:
            raise CheckpointError(f"there are more than {_MOST} models in the {layout.name} layout: state a prefix")
    return found


def _missing_markers(place: Place, index: list[str]) -> tuple[str, ...]:
    return tuple(marker for marker in place.layout.detection.markers if not _has(index, place, marker))


def _has(index: list[str], place: Place, marker: str) -> bool:
    """Whether the model has a marker key: this one, or one that begins so if it ends in a dot."""
    whole = not marker.endswith(".")
    return any(_begins(index, front + marker, whole) for front in (place.wrapper, place.front))


def _begins(index: list[str], text: str, whole: bool = False) -> bool:
    """Whether any of the sorted keys begins with `text`, or with `whole` is equal to it."""
    i = bisect_left(index, text)
    return i < len(index) and (index[i] == text if whole else index[i].startswith(text))


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
