"""SEAM: search on a small proxy data set and keep the policy for the target (Tang et al., ACM MM 2023)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import Candidates, LayerGraph
from ..core.checks import is_finite, number, whole
from ..errors import InvalidArgument
from ..nn.layers import first_operand
from ..tasks import to_device
from ..train.hooks import Groups
from .ebs import EBS, NETWORK
from .proxy import class_loader, labels_in
from .strategy import register_strategy


def margin_loss(features: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Compute mean_i(1 − cos(z_i, μ_{y_i})) + mean_{c≠c'} relu(cos(μ_c, μ_c') − margin), for compact, distant classes.

    This is our construction. The centres μ are those of the batch. With a single class, the second term is 0.

    Args:
        features: Features `[N, d]`, which are L2-normalised here.
        labels: Class of each sample, `[N]`.
        margin: Cosine between centres that is not penalized.
    """
    z = F.normalize(features.float(), dim=1)
    classes, index = labels.unique(return_inverse=True)
    centres = F.normalize(torch.zeros(len(classes), z.shape[1]).to(z).index_add(0, index, z), dim=1)
    compact = 1 - (z * centres[index]).sum(1).mean()
    if len(classes) < 2:
        return compact
    cosine = centres @ centres.T
    apart = ~torch.eye(len(classes), dtype=torch.bool, device=z.device)
    return compact + torch.relu(cosine[apart] - margin).mean()


@register_strategy("seam")
class SEAM(EBS):
    """Class-aware search on a proxy data set (SEAM), with differentiable bit-widths as in EBS.

    The loss is CE(proxy) + strength·relu(E[cost]/cap − 1) + discriminability·L_margin on the features that the head
    reads. The approach follows the abstract of the paper; the loss is our construction.

    The classifier must be a layer of the graph, so it must not be excluded. With a loader as the proxy, its bit-widths
    must be fixed.

    Args:
        proxy: A fraction of the training data (0.04 for 4 % of each class), or a loader of labelled batches of another
            data set. That data set may have other classes: a new head is first trained for `warmup` steps, with the
            rest frozen.
        discriminability: Multiplier of the margin loss.
        margin: Cosine between class centres that is not penalized, −1 to 1.
        classes: Number of classes in a batch, if `proxy` is a fraction; None for as many as fill the user's batch size.
        per_class: Number of images of each class in a batch, at least 4.
        warmup: Training steps of a new head.
        **options: Options of EBS.
    """

    def __init__(
        self,
        *,
        proxy: float | Iterable[Any] = 0.04,
        discriminability: float = 1.0,
        margin: float = 0.2,
        classes: int | None = None,
        per_class: int = 8,
        warmup: int = 20,
        **options: Any,
    ) -> None:
        super().__init__(**{"update": "single", **options})
        if self.update != "single":
            raise InvalidArgument("update must be 'single' for seam, which trains everything on one proxy batch")
        self.share = float(proxy) if is_finite(proxy) else None  # type: ignore[arg-type]
        loads = isinstance(proxy, Iterable) and not isinstance(proxy, (str, bytes))
        if not (loads if self.share is None else 0 < self.share <= 1):
            raise InvalidArgument(f"proxy must be a number above 0 and at most 1, or a loader, got {proxy!r}")
        if isinstance(proxy, Iterator):
            raise InvalidArgument("proxy must be readable several times, got an iterator; pass a loader or a list")
        if whole("per_class", per_class, 1) < 4:
            raise InvalidArgument(f"per_class must be at least 4, got {per_class}")
        if not is_finite(margin) or not -1 <= margin <= 1:
            raise InvalidArgument(f"margin must be a cosine between -1 and 1, got {margin!r}")
        self.proxy, self.discriminability, self.margin = proxy, number("discriminability", discriminability), margin
        self.classes = None if classes is None else whole("classes", classes, 1)
        self.per_class, self.warmup = per_class, whole("warmup", warmup, 0)
        self._features: list[Tensor] = []

    def loader(self, train: Iterable[Any]) -> Iterable[Any]:
        if self.share is None:
            self.source: Iterable[Any] = self.proxy  # type: ignore[assignment]
        else:
            self.source = class_loader(train, self.share, self.classes, self.per_class, self.seed)
        return self.source

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        super().attach(model, graph, candidates, norms)
        self.head = graph.layers[-1].name
        if self.share is None and self.head in self.layers:
            raise InvalidArgument(
                f"layer {self.head!r} must have fixed bit-widths, since a loader as proxy needs a new head"
            )

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        super().calibrate(model, batches, inputs)
        labels = self.loss.task.labels(batches[0])
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
            raise InvalidArgument("seam needs proxy data with one class label for each sample")
        if self.loss.distill:
            raise InvalidArgument("seam trains on labels alone; omit distill")
        self.check_head(model, batches[0])
        if self.share is None:
            self.renew_head(model, max(labels_in(map(self.loss.task.labels, self.source)) + 1, 2))
        model.get_submodule(self.head).register_forward_pre_hook(self._keep, with_kwargs=True)

    @torch.no_grad()
    def check_head(self, model: nn.Module, batch: Any) -> None:
        """Raise InvalidArgument unless the last layer of the graph is the classifier: runs last, and gives the logits.

        An excluded classifier is not in the graph, whose last layer is then another one, with other features.
        """
        ran: list[nn.Module] = []
        weighted = [m for m in model.modules() if isinstance(w := getattr(m, "weight", None), Tensor) and w.dim() > 1]
        handles = [m.register_forward_pre_hook(lambda module, _args: ran.append(module)) for m in weighted]
        training = model.training
        model.eval()
        try:
            classes = self.loss.task.head(self.loss.task.forward(model, batch)).shape[-1]
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        head: Any = model.get_submodule(self.head)
        if ran[-1:] != [head] or head.weight.shape[0] != classes:
            raise InvalidArgument(
                f"seam needs the classifier as the last layer, and {self.head!r} does not compute the logits; do not "
                "exclude the classifier"
            )

    def renew_head(self, model: nn.Module, classes: int) -> None:
        """Replace the head of the copy for a proxy with other classes, and train it on frozen features."""
        old = model.get_submodule(self.head)
        if not isinstance(old, nn.Linear):
            raise InvalidArgument(f"a loader as proxy needs a Linear head, got {type(old).__name__} for {self.head!r}")
        width = old.in_features
        generator = torch.Generator().manual_seed(self.seed)
        head = nn.Linear(width, classes)
        with torch.no_grad():
            head.weight.copy_(torch.randn(classes, width, generator=generator) / width**0.5)
            head.bias.zero_()
        parent, _, leaf = self.head.rpartition(".")
        setattr(model.get_submodule(parent), leaf, head.to(old.weight))
        self._warm_up(model, head)

    def _warm_up(self, model: nn.Module, head: nn.Linear) -> None:
        device = head.weight.device
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        seen: list[Tensor] = []

        def see(_m: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(first_operand(args, kwargs).detach())

        handle = head.register_forward_pre_hook(see, with_kwargs=True)
        training = model.training
        model.eval()
        steps = 0
        try:
            while steps < self.warmup:
                before = steps
                for batch in self.source:
                    batch = to_device(batch, device)
                    with torch.no_grad():
                        self.loss.task.forward(model, batch)
                    x, labels = seen.pop(), self.loss.task.labels(batch)
                    loss = F.cross_entropy(head(x).float(), labels, ignore_index=self.loss.task.ignore_index)
                    seen.clear()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    steps += 1
                    if steps >= self.warmup:
                        break
                if steps == before:
                    raise InvalidArgument("proxy gave no batches when it was read again; pass a loader or a list")
        finally:
            handle.remove()
            model.train(training)
            optimizer.zero_grad(set_to_none=True)  # else the first step of the search would include this gradient

    def _keep(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._features = [first_operand(args, kwargs)]

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, Groups]]:
        self._draw(rng)
        labels = self.loss.task.labels(batch)
        loss, _ = self.loss.task.run(model, batch, self.loss.smoothing)
        features = self._features.pop()
        counted = labels != self.loss.task.ignore_index
        margin = margin_loss(features.flatten(1)[counted], labels[counted], self.margin)
        yield loss + self.discriminability * margin, (*NETWORK, "strengths")
        yield self.penalty(), "prices"

    def details(self, model: nn.Module) -> dict[str, Any]:
        return {**super().details(model), "proxy_share": self.share, "fresh_head": self.share is None}
