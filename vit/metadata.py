"""What a model carries besides its weights: how its images are prepared, and where it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .checks import as_pair, require_float, unknown

EXPORTED_KEY = "vit.version"  # a key in the metadata of files that `vit.export` writes
MODES = ("crop", "squash")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How images were prepared for the weights. Defaults: AugReg's ViT-S/16 at 224.

    Raises:
        ValueError: a field of the wrong type or out of range.
    """

    size: tuple[int, int] = (224, 224)  # (H, W) after the crop; an int is a square
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel, for pixels in [0, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"  # one of INTERPOLATIONS: Pillow's filters, which are antialiased
    crop_pct: float = 0.9  # in "crop" the image is first resized to size / crop_pct
    mode: str = "crop"  # or "squash": resized to size whatever the proportions, nothing cut off

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_pair(self.size, "size"))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not values:
                raise ValueError(f"{name} must be a list with one number per channel, not {values!r}")
            for value in values:
                require_float(f"each value of {name}", value)
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {self.std}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(unknown("interpolation", self.interpolation, INTERPOLATIONS))
        require_float("crop_pct", self.crop_pct)
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct must lie in (0, 1], not {self.crop_pct!r}")
        if self.mode not in MODES:
            raise ValueError(unknown("mode", self.mode, MODES))

    def with_channels(self, channels: int) -> Preprocessing:
        """The same for another number of channels; for lack of statistics, each gets the averages."""
        if channels == len(self.mean):
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * channels, std=(std,) * channels)


@dataclass(frozen=True)
class Provenance:
    """Where a model's weights came from.

    `save_checkpoint` stores the provenance of the model that it saves; reading that file gives a new record, of the
    file itself, with the stored one as its `parent`.
    """

    source: str  # the file, or hf-hub:organization/name
    sha256: str  # of the weights file, as read
    layout: str  # "timm", "vit" ...
    commit: str | None = None  # of the Hub's repository
    license: str | None = None
    parent: Provenance | None = None
    part: str | None = None  # what precedes the weights' names, if the file held other models too ("teacher.")
    recipe: str | None = None  # how they were trained since: a `vit.training.Recipe`, as JSON

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON. What is not known is left out, so that earlier versions can read the rest."""
        return asdict(self, dict_factory=lambda items: {name: value for name, value in items if value is not None})

    @classmethod
    def from_dict(cls, values: dict) -> Provenance:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown or missing field, or one that is not text.
        """
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) - known or {"source", "sha256", "layout"} - set(values):
            raise ValueError(f"provenance must be an object with the fields {sorted(known)}, not {values!r}")
        parent = values.get("parent")
        texts = {name: value for name, value in values.items() if name != "parent"}
        if not all(value is None or isinstance(value, str) for value in texts.values()):
            raise ValueError(f"the fields of provenance must be text, not {texts!r}")
        return cls(**texts, parent=None if parent is None else cls.from_dict(parent))
