"""SEAM: search on a small proxy data set, keep the policy for the target (Tang et al., ACM MM 2023)."""

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
    """mean_i(1 − cos(z_i, μ_{y_i})) + mean_{c≠c'} relu(cos(μ_c, μ_c') − margin) [ours]: compact classes, far apart.

    features [N, d] are L2-normalised here; centres are the batch's. Zero separation term for a single class.
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
    """Differentiable widths as in EBS; loss = CE(proxy) + strength·relu(E[cost]/cap − 1) + discriminability·L_margin
    on the features the head reads [abstract sure, loss ours].

    proxy: a share of the target's training data (0.04: 4 % of each class), or a loader of labelled batches of another
    data set, whose classes may be others: then a fresh head is trained for `warmup` steps first, the rest frozen. The
    classifier has to be a layer of the graph (not excluded), and must not itself be searched with a loader.
    classes, per_class: a batch of a share holds that many classes and images of each (K ≥ 4); classes None: as many as
    fill the user's batch size.
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
            raise InvalidArgument("seam learns weights and strengths on one proxy batch: update is single")
        self.share = float(proxy) if is_finite(proxy) else None  # type: ignore[arg-type]
        loads = isinstance(proxy, Iterable) and not isinstance(proxy, (str, bytes))
        if not (loads if self.share is None else 0 < self.share <= 1):
            raise InvalidArgument(f"proxy is a share above 0 and at most 1, or a loader of batches; not {proxy!r}")
        if isinstance(proxy, Iterator):
            raise InvalidArgument("a proxy is read more than once: give a loader or a list of batches, not an iterator")
        if whole("per_class", per_class, 1) < 4:
            raise InvalidArgument(f"compactness needs at least 4 images of a class in a batch, not {per_class}")
        if not is_finite(margin) or not -1 <= margin <= 1:
            raise InvalidArgument(f"margin is a cosine, from -1 to 1, not {margin!r}")
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
                f"a loader as proxy gets a head of its own, so {self.head!r} cannot be searched; leave its widths fixed"
            )

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        super().calibrate(model, batches, inputs)
        labels = self.loss.task.labels(batches[0])
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
            raise InvalidArgument("seam needs one class label a sample in its proxy data")
        if self.loss.distill:
            raise InvalidArgument("seam learns from labels alone; leave distill out")
        self.check_head(model, batches[0])
        if self.share is None:
            self.renew_head(model, max(labels_in(map(self.loss.task.labels, self.source)) + 1, 2))
        model.get_submodule(self.head).register_forward_pre_hook(self._keep, with_kwargs=True)

    @torch.no_grad()
    def check_head(self, model: nn.Module, batch: Any) -> None:
        """Raise InvalidArgument unless the graph's last layer is the classifier: runs last, as wide as the logits.

        An excluded classifier is in no graph, and the last layer there is another one, with other features.
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
                f"seam needs the classifier among the layers, and the last of them, {self.head!r}, does not give the "
                "logits; do not exclude the classifier"
            )

    def renew_head(self, model: nn.Module, classes: int) -> None:
        """A head of its own for a proxy of other classes, trained on frozen features; the copy only."""
        old = model.get_submodule(self.head)
        if not isinstance(old, nn.Linear):
            raise InvalidArgument(
                f"a proxy of other classes needs a linear head, {self.head!r} is {type(old).__name__}"
            )
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
                    raise InvalidArgument("the proxy gave its batches once only; give a loader that can be read again")
        finally:
            handle.remove()
            model.train(training)
            optimizer.zero_grad(set_to_none=True)  # else the search's first step had it in its gradient

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
