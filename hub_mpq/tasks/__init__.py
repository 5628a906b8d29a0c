"""Tasks: how batches are read, and which loss, comparison of outputs and metrics apply."""

from .batch import Pair, to_device
from .classification import Classification
from .detect import TaskLike, task_of
from .detection import Detection
from .embedding import Embedding
from .heads import Heads
from .multi_label import MultiLabel
from .own import Contrastive, Own
from .question_answering import QuestionAnswering
from .regression import Regression
from .segmentation import Segmentation
from .task import Task
from .tokens import CausalLM, MaskedLM, Seq2SeqLM, TokenClassification

__all__ = [
    "CausalLM",
    "Classification",
    "Contrastive",
    "Detection",
    "Embedding",
    "Heads",
    "MaskedLM",
    "MultiLabel",
    "Own",
    "Pair",
    "QuestionAnswering",
    "Regression",
    "Segmentation",
    "Seq2SeqLM",
    "Task",
    "TaskLike",
    "TokenClassification",
    "task_of",
    "to_device",
]
