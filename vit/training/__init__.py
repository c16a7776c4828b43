"""Fine-tuning: `train` is the loop, `Recipe` its numbers. The core does not know this package."""

from .data import Images, RandomCrop, balanced
from .evaluation import evaluate
from .loop import train
from .recipes import RECIPES, Recipe, learning_rate, parameter_groups
from .state import State, restore, save

__all__ = [
    "RECIPES", "Images", "RandomCrop", "Recipe", "State", "balanced", "evaluate", "learning_rate", "parameter_groups",
    "restore", "save", "train",
]  # fmt: skip
