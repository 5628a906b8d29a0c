"""SEAM: search on a small proxy data set, keep the policy for the target (Tang et al., ACM MM 2023)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidArgument
from ..spec import Candidates, LayerGraph
from ..train.batch import forward, labels_of, logits_of, to_device
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
    data set, whose classes may be others: then a fresh head is trained for `warmup` steps first, the rest frozen.
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
        if isinstance(proxy, (int, float)) and not 0 < proxy <= 1:
            raise InvalidArgument(f"proxy is a share above 0 and at most 1, or a loader; not {proxy}")
        if per_class < 4:
            raise InvalidArgument(f"compactness needs at least 4 images of a class in a batch, not {per_class}")
        self.proxy, self.discriminability, self.margin = proxy, discriminability, margin
        self.classes, self.per_class, self.warmup = classes, per_class, warmup
        self.fresh_head = False
        self._features: list[Tensor] = []

    def loader(self, train: Iterable[Any]) -> Iterable[Any]:
        if not isinstance(self.proxy, (int, float)):
            self.source: Iterable[Any] = self.proxy
        else:
            self.source = class_loader(train, float(self.proxy), self.classes, self.per_class, self.seed)
        return self.source

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        super().attach(model, graph, candidates, norms)
        self.head = graph.layers[-1].name

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        super().calibrate(model, batches, inputs)
        labels = labels_of(batches[0])
        if labels is None or labels.is_floating_point() or labels.dim() != 1:
            raise InvalidArgument("seam needs one class label a sample in its proxy data")
        if not isinstance(self.proxy, (int, float)):
            self.renew_head(model, max(labels_in(self.source) + 1, 2))
        model.get_submodule(self.head).register_forward_pre_hook(self._keep)

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
        self.fresh_head = True
        self._warm_up(model, head)

    def _warm_up(self, model: nn.Module, head: nn.Linear) -> None:
        device = head.weight.device
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
        training = model.training
        model.eval()
        steps = 0
        try:
            while steps < self.warmup:
                for batch in self.source:
                    batch = to_device(batch, device)
                    with torch.no_grad():
                        forward(model, batch)
                    x, labels = seen.pop(), labels_of(batch)
                    loss = F.cross_entropy(head(x).float(), labels)
                    seen.clear()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    steps += 1
                    if steps >= self.warmup:
                        break
        finally:
            handle.remove()
            model.train(training)

    def _keep(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = [args[0]]

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, Groups]]:
        self._draw(rng)
        logits = logits_of(forward(model, batch))
        labels = labels_of(batch)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.loss.smoothing)
        features = self._features.pop()
        margin = margin_loss(features.flatten(1), labels, self.margin)  # type: ignore[arg-type]
        yield loss + self.discriminability * margin, (*NETWORK, "strengths")
        yield self.penalty(), "prices"

    def details(self, model: nn.Module) -> dict[str, Any]:
        share = self.proxy if isinstance(self.proxy, (int, float)) else None
        return {**super().details(model), "proxy_share": share, "fresh_head": self.fresh_head}
