"""The one training loop, its losses, and evaluation."""

from .batch import forward, labels_of, logits_of, task_loss
from .evaluate import evaluate
from .finetune import Finetune, finetune
from .hooks import Hooks
from .loop import TrainLog, fit

__all__ = [
    "Finetune",
    "Hooks",
    "TrainLog",
    "evaluate",
    "finetune",
    "fit",
    "forward",
    "labels_of",
    "logits_of",
    "task_loss",
]
