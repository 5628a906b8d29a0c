"""The training loop, fine-tuning and evaluation."""

from .evaluate import evaluate
from .finetune import Finetune, finetune
from .hooks import Hooks
from .loop import TrainLog, fit

__all__ = ["Finetune", "Hooks", "TrainLog", "evaluate", "finetune", "fit"]
