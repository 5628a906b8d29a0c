"""The one training loop, its losses, and evaluation."""

from .batch import forward, labels_of, logits_of, task_loss
from .engine import Engine
from .evaluate import evaluate
from .finetune import Finetune
from .hooks import Hooks
from .loop import TrainLog, fit

__all__ = [
    "Engine",
    "Finetune",
    "Hooks",
    "TrainLog",
    "evaluate",
    "fit",
    "forward",
    "labels_of",
    "logits_of",
    "task_loss",
]
