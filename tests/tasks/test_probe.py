"""A task's probe: the squared derivative of a random value is on average the task's divergence."""

from __future__ import annotations

import pytest
import torch

from hub_mpq.tasks import (
    CausalLM,
    Classification,
    Embedding,
    Heads,
    MultiLabel,
    QuestionAnswering,
    Regression,
    Segmentation,
    Seq2SeqLM,
    TokenClassification,
)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Span(dict):
    """An output of question answering."""

    start_logits = property(lambda self: self["start_logits"])
    end_logits = property(lambda self: self["end_logits"])


MASK = torch.arange(5).expand(8, 5) < torch.tensor([5, 5, 3, 2, 4, 5, 1, 5])[:, None]
CASES = {
    "classes": (Classification(), {"output": draw(8, 6)}, None),
    "classes beside features": (Classification(output="logits"), {"logits": draw(8, 6), "z": 30 * draw(8, 3)}, None),
    "labels": (MultiLabel(), {"output": draw(8, 4)}, None),
    "numbers": (Regression(), {"output": 50 * draw(8, 1)}, None),
    "maps": (Regression(), {"output": draw(8, 1, 4, 3) + 2}, None),
    "tokens": (TokenClassification(), {"output": draw(8, 5, 4)}, MASK),
    "tokens beside features": (
        TokenClassification(output="logits"),
        {"logits": draw(8, 5, 4), "z": draw(8, 5, 2)},
        MASK,
    ),
    "next words": (CausalLM(), {"output": draw(8, 5, 7)}, None),
    "words": (Seq2SeqLM(), {"output": draw(8, 5, 7)}, MASK),
    "pixels of a class that labels leave out": (Segmentation(ignore_index=0), {"output": draw(8, 3, 2, 4)}, None),
    "pixels": (Segmentation(), {"output": draw(8, 3, 2, 4)}, None),
    "span": (QuestionAnswering(), Span(start_logits=draw(8, 5), end_logits=draw(8, 5)), None),
    "features": (Embedding(), {"a": draw(8, 5, 3), "b": 1000 * draw(8, 2)}, MASK),
    "heads": (
        Heads({"0": Classification(), "1": TokenClassification(), "2": Regression()}),
        (draw(8, 6), draw(8, 5, 4), 9 * draw(8, 2)),
        None,
    ),
}


def noise(x, seed):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def mapped(output, function):
    """An output of the same form with every tensor changed."""
    if isinstance(output, tuple):
        return tuple(function(i, x) for i, x in enumerate(output))
    return type(output)({name: function(i, x) for i, (name, x) in enumerate(output.items())})


@pytest.mark.parametrize("name", CASES)
def test_squared_derivatives_are_the_divergence(name):
    task, reference, mask = CASES[name]
    step = mapped(
        reference, lambda i, x: 0.02 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
    )
    moved = mapped(reference, lambda i, x: x + list(step.values() if isinstance(step, dict) else step)[i])
    values, kept = task.divergence(moved, reference, mask)
    if name == "next words":  # the last place has no next word
        kept[:, -1] = False
    wanted = float((values * kept).sum())
    leaves = mapped(reference, lambda i, x: x.clone().requires_grad_())
    several = list(leaves.values()) if isinstance(leaves, dict) else list(leaves)
    steps = [0.02 * x.std() * noise(x, i) for i, x in enumerate(several)]
    generator = torch.Generator().manual_seed(3)
    found, rounds = 0.0, 400
    for _ in range(rounds):
        drawn, counted = task.probe(leaves, generator, mask)
        grads = torch.autograd.grad((drawn * counted).sum(), several, allow_unused=True)
        products = [(g * s).flatten(1).sum(1) for g, s in zip(grads, steps, strict=True) if g is not None]
        found += float(sum(products).detach().square().sum()) / rounds
    assert found == pytest.approx(wanted, rel=0.1)
    assert counted.sum() == kept.sum()


@pytest.mark.parametrize(("name", "unit"), [("classes", "kl"), ("next words", "kl"), ("numbers", "target_error")])
def test_the_unit_says_whether_there_is_a_distribution(name, unit):
    task, output, _ = CASES[name]
    assert task.unit(output) == unit
    assert Classification().unit(draw(8, 1)) == "target_error"
