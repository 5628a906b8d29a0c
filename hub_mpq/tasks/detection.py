"""Objects in images: their classes and boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.task import register_task
from .own import Own
from .task import T


class Detection(Own):
    """The model's own loss; all outputs are targets.

    Labels are a list of {class_labels, boxes}, one a sample, with boxes as (centre x, centre y, width, height) in parts
    of the image, as transformers' detectors take them.

    With `pip install "hub-mpq[detection]"` (torchmetrics, pycocotools) the mean average precision is measured too.
    """

    name = "detection"
    classes: int | None = None

    def bind(self: T, model: nn.Module, example: Any = None) -> T:
        out = super().bind(model, example)
        out.classes = getattr(getattr(model, "config", None), "num_labels", None)  # type: ignore[attr-defined]
        return out

    def whole(self) -> Any:
        """Mean average precision (COCO's, and at an overlap of one half), in percent; None without torchmetrics."""
        try:
            from torchmetrics.detection import MeanAveragePrecision

            return _Precision(MeanAveragePrecision(box_format="cxcywh"), self.classes)
        except ImportError:  # it asks for pycocotools itself
            return None


class _Precision:
    def __init__(self, measure: Any, classes: int | None) -> None:
        self.measure, self.classes = measure, classes

    def update(self, output: Any, labels: Any) -> None:
        found = next(iter(labels.values())) if isinstance(labels, dict) else labels
        wanted = [{"boxes": x["boxes"].float(), "labels": x["class_labels"].long()} for x in found]
        self.measure.update([self._boxes(*pair) for pair in zip(output.logits, output.pred_boxes, strict=True)], wanted)

    def _boxes(self, logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        # one logit more than classes is "no object", of a softmax; else each class has a probability of its own
        alone = self.classes is not None and logits.shape[-1] == self.classes
        p = logits.float().sigmoid() if alone else logits.float().softmax(-1)[..., :-1]
        scores, labels = p.max(-1)
        return {"boxes": boxes.float(), "scores": scores, "labels": labels}

    def compute(self) -> dict[str, float]:
        found: dict[str, Tensor] = self.measure.compute()
        return {key: 100 * float(torch.as_tensor(found[key])) for key in ("map", "map_50")}


register_task(Detection())
