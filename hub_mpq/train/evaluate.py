"""Measure a model: top-1 / top-5, loss and perplexity, or fidelity to the float model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import HubMPQError, InvalidArgument
from .batch import forward, labels_of, logits_of, size_of, to_device
from .processes import each, own_share, raise_together, total, world


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], *, reference: nn.Module | None = None) -> dict[str, float]:
    """Metrics over all samples of `loader`, in percent where they are shares.

    Class labels (one a sample): top1, top5 and loss. Dicts on which the model computes a loss: loss, perplexity.
    No labels: needs `reference` (the float model) and gives fidelity, the signal-to-noise ratio of the output in dB,
    and agreement of the arg max. Raises InvalidArgument for an empty loader or one without labels or reference.
    Launched as several processes, all must call it; each measures its part and all get the figures of the whole.
    """
    from huggingface_hub.utils import tqdm

    training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    count = 0.0
    failed: HubMPQError | None = None
    mine = own_share(loader) if world()[1] > 1 else loader  # alone, the order does not matter
    try:
        for batch in tqdm(mine, desc="evaluate", unit="batch", leave=False, disable=True if world()[0] else None):
            batch = to_device(batch, device)
            rows = _measure(model, batch, reference)
            size = size_of(batch)
            count += size
            for name, value in rows.items():
                sums[name] = sums.get(name, 0.0) + value * size
    except HubMPQError as error:
        failed = error
    finally:
        model.train(training)
    raise_together(failed)
    if world()[1] > 1:
        names = sorted({name for found in each(sorted(sums)) for name in found})
        count, *values = total(count, *(sums.get(name, 0.0) for name in names))
        sums = dict(zip(names, values, strict=True))
    if not count:
        raise InvalidArgument("the data loader is empty")
    out = {name: value / count for name, value in sums.items()}
    if "perplexity" in out:
        out["perplexity"] = math.exp(min(out["loss"], 700.0))
    if "noise" in out:
        out["fidelity_db"] = -10 * math.log10(max(out.pop("noise"), 1e-30))
    return {**out, "samples": float(count)}


def _measure(model: nn.Module, batch: Any, reference: nn.Module | None) -> dict[str, float]:
    labels = labels_of(batch)
    if labels is None:
        if reference is None:
            raise InvalidArgument(
                "the batches have no labels: accuracy cannot be measured, only fidelity to a float model"
            )
        output, target = forward(model, batch), forward(reference, batch)
        s, t = logits_of(output).float(), logits_of(target).float()
        return {
            "noise": float((s - t).square().sum() / t.square().sum().clamp_min(1e-30)),
            "agreement": float((s.argmax(-1) == t.argmax(-1)).float().mean()) * 100,
        }
    output = forward(model, batch, labels=True)
    loss = getattr(output, "loss", None)
    logits = logits_of(output).float()
    if labels.dim() != 1 or labels.is_floating_point() or logits.dim() != 2:
        if loss is None:
            raise InvalidArgument(
                f"labels of shape {tuple(labels.shape)} fit no metric for logits {tuple(logits.shape)}"
            )
        return {"loss": float(loss), "perplexity": 0.0}
    if int(labels.max()) >= logits.shape[-1]:
        raise InvalidArgument(f"label {int(labels.max())} is outside the model's {logits.shape[-1]} classes")
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    return {
        "top1": float(ranked[:, 0].float().mean()) * 100,
        "top5": float(ranked.any(-1).float().mean()) * 100,
        "loss": float(torch.nn.functional.cross_entropy(logits, labels)),
    }
