"""A number that means nothing is refused before any work, by every method of HubMPQ, strategy and command.

Parameters are found by introspection, so that a new one is tested too.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch
import typer
from typer.testing import CliRunner

from hub_mpq import Budget, FinetuneOptions, HubMPQ, IndicatorOptions
from hub_mpq.cli import app
from hub_mpq.core import limits
from hub_mpq.errors import InvalidArgument
from hub_mpq.search.strategy import strategies

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
SECONDS = ("time_limit", "validate_seconds")
"""Time limits, of which infinity means none."""
NUMBER = re.compile(r"\b(int|float|GroupSizes)\b")


class Untouched:
    """Data that nobody may read."""

    def __iter__(self):
        raise AssertionError("data were read before the numbers were checked")


def bad(name):
    return [-1, NAN, HUGE, True, *([] if name in SECONDS else [INF])]


def numbers(function):
    """Names of the parameters of a function that take numbers."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if NUMBER.search(str(p.annotation))]


METHODS = [
    (name, number)
    for name, method in inspect.getmembers(HubMPQ, inspect.isfunction)
    if not name.startswith("_") and name in vars(HubMPQ)
    for number in numbers(method)
]
OPTIONS = [
    (method, f.name)
    for method, kind in (("train_indicators", IndicatorOptions), ("finetune", FinetuneOptions))
    for f in fields(kind)
    if NUMBER.search(str(f.type))
]
STRATEGIES = [
    (name, number)
    for name in ("limpq", "dq", "ebs", "seam", "bsq", "gradient", "hessian", "mse", "kl")
    for number in numbers(strategies.get(name))
]


@pytest.fixture(scope="module")
def learned():
    net = torch.nn.Sequential(*(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU()))
    mpq = HubMPQ.from_module(net.append(torch.nn.Flatten()).append(torch.nn.Linear(64, 3)), torch.zeros(1, 1, 8, 8))
    mpq.train_indicators([(torch.zeros(4, 1, 8, 8), torch.arange(4) % 3)], steps=0)
    return mpq


def given(method, **numbers):
    """Arguments of a call whose numbers are refused: data that nobody may read, and a budget."""
    taken = inspect.signature(getattr(HubMPQ, method)).parameters
    data = {name: Untouched() for name in ("train", "val", "calibration", "text") if name in taken}
    return {**data, **({"policy": "W4A4"} if "policy" in taken else {}), **numbers}


def test_the_lists_are_not_empty():
    assert {("quantize", "seed"), ("pareto", "points"), ("apply_policy", "batches"), ("search", "alpha")} <= {*METHODS}
    assert {("finetune", "lr"), ("train_indicators", "share"), ("finetune", "checkpoint_every")} <= {*OPTIONS}
    assert {("seam", "proxy"), ("hessian", "probes"), ("dq", "weight_bytes"), ("limpq", "scale_lr")} <= {*STRATEGIES}


@pytest.mark.parametrize(("method", "name"), METHODS + OPTIONS)
def test_a_number_of_a_method_that_means_nothing_is_refused(learned, method, name):
    budget = {"bitops": "W4A4"} if method in ("search", "quantize") else {}
    for value in bad(name):
        with pytest.raises(InvalidArgument, match=name.replace("_", "[ _]")):
            getattr(learned, method)(**given(method, **budget, **{name: value}))


@pytest.mark.parametrize("limit", [limit.name for limit in limits])
def test_an_amount_of_a_limit_that_means_nothing_is_refused(learned, limit):
    for value in [-1, 0, NAN, INF, HUGE, True]:
        for search in (learned.search, learned.check_reachable):
            with pytest.raises(InvalidArgument, match=limit):
                search(**{limit: value})
        with pytest.raises(InvalidArgument, match=limit):
            learned.quantize(train=Untouched(), val=Untouched(), **{limit: value})


@pytest.mark.parametrize("value", [NAN, INF, HUGE, True, "1"])
def test_costs_of_ones_own_that_mean_nothing_are_refused(value):
    for costs in ((value, {}), (1, {"conv": {"W4A4": value}}), (1, {}, value)):
        with pytest.raises(InvalidArgument, match="joules"):
            Budget(costs={"joules": costs})


@pytest.mark.parametrize(("strategy", "name"), STRATEGIES)
def test_a_number_of_a_strategy_that_means_nothing_is_refused(learned, strategy, name):
    for value in bad(name)[name == "margin" :]:  # of a cosine -1 is meant
        options = {"strategy": strategy, "strategy_options": {name: value}}
        with pytest.raises(InvalidArgument, match=name):
            learned.train_scores(Untouched(), **options)
        with pytest.raises(InvalidArgument, match=name):
            learned.quantize(bitops="W4A4", train=Untouched(), val=Untouched(), **options)


def parameters(command):
    """[(name, types, whether it is required, what typer is told)] of a command."""
    hints = get_type_hints(command, include_extras=True)
    for p in inspect.signature(command).parameters.values():
        if p.name in ("ctx", "invocation"):  # typer's own
            continue
        annotation = hints.get(p.name, p.annotation)
        kind, told = get_args(annotation)[:2] if get_origin(annotation) is Annotated else (annotation, p.default)
        yield p.name, {*(get_args(kind) or (kind,))}, p.default is inspect.Parameter.empty, told


COMMANDS = {command.callback.__name__: list(parameters(command.callback)) for command in app.registered_commands}
SWITCHES = [
    (command, f"--{name.replace('_', '-')}")
    for command, found in COMMANDS.items()
    for name, types, *_ in found
    if types & {int, float}
]


def test_the_list_of_switches_is_not_empty():
    assert {("quantize", "--lr"), ("pareto", "--points"), ("solve", "--time-limit"), ("demo", "--seed")} <= {*SWITCHES}
    assert len(SWITCHES) > 50


@pytest.mark.parametrize(("name", "switch"), SWITCHES)
def test_a_number_of_a_command_that_means_nothing_is_refused(name, switch, monkeypatch, tmp_path):
    def work(*_, **__):
        raise AssertionError("work began before the numbers were checked")

    for place in ("cli.models.load", "solve.solve_table", "demo.run", "cli.models.read_indicators_of"):
        monkeypatch.setattr(f"hub_mpq.{place}", work)
    monkeypatch.setattr("hub_mpq.cli.launch.arguments", work)
    monkeypatch.chdir(tmp_path)
    others = []
    for needed, _, required, told in COMMANDS[name]:
        if required and isinstance(told, type(typer.Argument())):
            others.append("x")
        elif required and (option := f"--{needed.replace('_', '-')}") != switch:
            others += [option, "x"]
    values = ["-1", "nan", "9" * 400, "1e400", "inf", "x", ""]
    if switch.strip("-").replace("-", "_") in SECONDS:
        values = ["-1", "0", "nan", "x", ""]
    for value in values:
        result = CliRunner().invoke(app, [name, switch, value, *others])
        assert result.exit_code == 2, (value, result.stderr, result.exception)
        assert result.stdout == ""
        assert switch.strip("-").removeprefix("indicator-") in result.stderr.replace("_", "-")
    assert not any(tmp_path.iterdir())
