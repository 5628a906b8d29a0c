"""Object detection: classes and boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.task import register_task
from .own import Own
from .task import T


class Detection(Own):
    """Object detection with the model's own loss; all outputs are compared with the float model's.

    Labels are a list of dicts `{"class_labels": …, "boxes": …}`, one per sample, with boxes as (center x, center y,
    width, height) in fractions of the image size, as transformers' detectors expect.

    With `pip install "hub-mpq[detection]"` (torchmetrics, pycocotools), the mean average precision is measured too.

    Args:
        ignore_index: Unused; the model's loss decides.
        label_keys: Keys of labels in a dict; None for the label arguments of the model's forward.
        output: Unused; the loss reads the whole output.

    Example:
        >>> from hub_mpq.tasks import Detection
        >>> Detection().name
        'detection'
    """

    name = "detection"
    classes: int | None = None

    def bind(self: T, model: nn.Module, example: Any = None) -> T:
        out = super().bind(model, example)
        out.classes = getattr(getattr(model, "config", None), "num_labels", None)  # type: ignore[attr-defined]
        return out

    def whole(self) -> Any:
        """Mean average precision as `map` (COCO) and `map_50` (IoU 0.5), in percent.

        Returns:
            An object with `update` and `compute`; None if torchmetrics or pycocotools is not installed.
        """
        try:
            from torchmetrics.detection import MeanAveragePrecision

            return _Precision(MeanAveragePrecision(box_format="cxcywh"), self.classes)
        except ImportError:  # torchmetrics raises this too if pycocotools is missing
            return None


class _Precision:
    def __init__(self, measure: Any, classes: int | None) -> None:
        self.measure, self.classes = measure, classes

    def update(self, output: Any, labels: Any) -> None:
        found = next(iter(labels.values())) if isinstance(labels, dict) else labels
        wanted = [{"boxes": x["boxes"].float(), "labels": x["class_labels"].long()} for x in found]
        self.measure.update([self._boxes(*pair) for pair in zip(output.logits, output.pred_boxes, strict=True)], wanted)

    def _boxes(self, logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        # with one logit more than classes, a softmax includes "no object"; else each class has its own sigmoid
        alone = self.classes is not None and logits.shape[-1] == self.classes
        p = logits.float().sigmoid() if alone else logits.float().softmax(-1)[..., :-1]
        scores, labels = p.max(-1)
        return {"boxes": boxes.float(), "scores": scores, "labels": labels}

    def compute(self) -> dict[str, float]:
        found: dict[str, Tensor] = self.measure.compute()
        return {key: 100 * float(torch.as_tensor(found[key])) for key in ("map", "map_50")}


register_task(Detection())
