"""Training by a recipe: `train` takes one and leaves a model folder. Each part of a run has its module."""

from .processes import TRACKERS
from .trainer import Stopped, Trainer, TrainingError, train

__all__ = ["TRACKERS", "Stopped", "Trainer", "TrainingError", "train"]
