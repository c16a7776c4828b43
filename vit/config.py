"""A model's architecture: its sizes, and the choices that the shapes of its weights cannot tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .checks import as_pair, require_float, require_int, unknown
from .position import RULES

GLOBAL_POOLS = ("token", "avg", "token_avg", "dist")
GELUS = ("erf", "tanh")


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of a Vision Transformer. Frozen; values that contradict each other are refused.

    Names are timm's where timm has one. `ViTConfig()` is `vit_small_patch16_224`.

    Raises:
        ValueError: a field has a wrong type or range, or two fields contradict each other.
    """

    img_size: tuple[int, int] = (224, 224)  # (H, W) at which the position embedding was trained; an int is a square
    patch_size: int = 16  # p, in pixels
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the model returns the pooled features
    # What the head reads: the class "token", the "avg" of the patch tokens, both concatenated ("token_avg", as in
    # DINOv2's classifiers), or the class token, with a second head for the distillation token ("dist", as in DeiT)
    global_pool: str = "token"
    embed_dim: int = 384  # D
    depth: int = 12  # blocks
    num_heads: int = 6  # A
    mlp_ratio: float = 4.0  # the MLP's hidden width over D
    init_values: float | None = None  # LayerScale's starting value (arXiv:2103.17239, Eq. 3); None: no LayerScale
    fc_norm: bool = False  # the last norm follows the pooling instead of preceding it (MAE's fine-tuned models)
    dist_token: bool = False  # a distillation token (DeiT, arXiv:2012.12877) after the class token
    reg_tokens: int = 0  # registers (arXiv:2309.16588), after those tokens; they have no position embedding
    class_position: bool = True  # the class and distillation tokens have rows in the position embedding
    eps: float = 1e-6  # of every LayerNorm
    gelu: str = "erf"  # the exact form, or its "tanh" approximation (arXiv:1606.08415)
    position_rule: str = "timm"  # how the position embedding is resampled, a name in vit.position.RULES
    drop_path_rate: float = 0.0  # stochastic depth (arXiv:1603.09382) of the last block; rises linearly from 0
    grad_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time
    # Where a loaded model's values came from: field -> "shapes", "config.json", "the caller" ...
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", as_pair(self.img_size, "img_size"))
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            require_int(name, getattr(self, name), least=1)
        for name in ("num_classes", "reg_tokens"):
            require_int(name, getattr(self, name), least=0)
        for name in ("fc_norm", "dist_token", "class_position", "grad_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name, known in (("global_pool", GLOBAL_POOLS), ("gelu", GELUS), ("position_rule", tuple(RULES))):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), known))
        require_float("mlp_ratio", self.mlp_ratio, above=0.0)
        require_float("eps", self.eps, above=0.0)
        if self.init_values is not None:
            require_float("init_values", self.init_values)
        require_float("drop_path_rate", self.drop_path_rate)
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must lie in [0, 1), not {self.drop_path_rate}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if not float(self.embed_dim * self.mlp_ratio).is_integer():
            raise ValueError(f"embed_dim {self.embed_dim} * mlp_ratio {self.mlp_ratio} is not a whole number")
        if self.global_pool == "dist" and not self.dist_token:
            raise ValueError("global_pool 'dist' reads the distillation token, and dist_token is False")
        if self.fc_norm and self.global_pool not in ("token", "avg"):
            raise ValueError(f"fc_norm goes with global_pool 'token' or 'avg', not with {self.global_pool!r}")
        height, width = self.img_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"img_size {height}x{width} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): the grid of patches for which the position embedding is stored."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """P: the tokens before the patches: class token, distillation token, registers."""
        return 1 + self.dist_token + self.reg_tokens

    @property
    def num_position_rows(self) -> int:
        """How many of the prefix tokens have a row in the position embedding: 0, 1 or 2."""
        return (1 + self.dist_token) * self.class_position

    @property
    def mlp_dim(self) -> int:
        """The MLP's hidden width."""
        return int(self.embed_dim * self.mlp_ratio)

    def override(self, **values: Any) -> ViTConfig:
        """A copy with other values.

        Raises:
            ValueError: an unknown field (the error gives the nearest one), or an invalid value.
        """
        self.check_names(values)
        sources = {name: source for name, source in self.sources.items() if name not in values}
        return replace(self, **values, sources=sources)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, without `sources`: `ViTConfig(**config.to_dict()) == config`."""
        return {name: getattr(self, name) for name in self.field_names()}

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of the fields that define a model: all but `sources`."""
        return [f.name for f in fields(cls) if f.name != "sources"]

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """ValueError for the first name that is not a field."""
        known = cls.field_names()
        for name in names:
            if name not in known:
                raise ValueError(unknown("config field", name, known))
