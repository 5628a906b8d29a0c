"""A network that is built under bounds takes no more modules, operators, memory or random values than it may."""

import contextlib
import math
import sys
import threading
import tracemalloc

import pytest
import torch
from torch import nn

from hub_mpq.adapters import bounded as module
from hub_mpq.adapters.bounded import Exceeded, bounded


class Deep(nn.Module):
    def __init__(self, depth, swallow=False):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            try:
                self.layers.append(nn.Identity())
            except Exception:
                if not swallow:
                    raise


def test_modules_without_parameters_are_counted():
    with bounded(tensors=4, nbytes=1000):
        Deep(500)
    with pytest.raises(Exceeded, match="more modules than a file of 1000 bytes holds"), bounded(4, 1000):
        Deep(10_000)
    Deep(10_000)  # afterwards nothing is bounded


def _swallowed(then):
    Deep(3000, swallow=True)
    then()


@pytest.mark.parametrize("then", [lambda: None, lambda: int("x")])
def test_an_error_that_a_constructor_swallows_is_raised_in_the_end(then):
    with pytest.raises(Exceeded), bounded(4, 1000):
        _swallowed(then)


def test_a_file_of_more_tensors_may_have_more_modules():
    with bounded(tensors=2000, nbytes=1000):
        Deep(10_000)


def test_operators_are_counted():
    with pytest.raises(Exceeded, match="more to compute"), bounded(4, 1000), torch.device("meta"):
        [torch.empty(1) for _ in range(100_000)]


@pytest.mark.parametrize("make", [lambda: nn.Embedding(5 * 10**7, 16), lambda: torch.zeros(10**9).expand(4, -1)])
def test_large_tensors_are_refused_on_meta_too(make):
    with pytest.raises(Exceeded, match="larger tensors"), bounded(4, 20_000), torch.device("meta"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.linspace(0, 1, 10**11, device="cpu"),
        lambda: torch.arange(10**11, device="cpu"),
        lambda: torch.randn(3, 200_000, 200_000, generator=torch.Generator().manual_seed(0), device="cpu"),
        lambda: torch.ones(1, device="cpu").repeat(10**11),
        lambda: torch.outer(*[torch.ones(10**6, device="cpu")] * 2),
        lambda: [torch.ones(10**6, device="cpu") for _ in range(10**4)],
    ],
)
def test_memory_is_refused_before_it_is_taken(make):
    """Constructors may name another device than meta; none of these could be answered by taking the memory."""
    with pytest.raises(Exceeded, match="more memory"), bounded(4, 20_000), torch.device("meta"):
        make()


def test_views_take_no_memory():
    with bounded(4, 1000):
        wide = torch.ones(1).expand(10**7)
        for _ in range(100):
            wide = wide.view(-1)


@pytest.mark.parametrize(
    "loop",
    [
        lambda n: [[i / 10000 for _ in range(10)] for i in range(n // 10)],
        lambda n: {i: f"LABEL_{i}" for i in range(n)},
        lambda n: [math.sin(i) for i in range(n)],
        lambda n: list(map(lambda i: i + 1, range(n))),  # noqa: C417
    ],
)
def test_loops_of_python_are_counted(loop, monkeypatch):
    monkeypatch.setattr(module, "LINES", 100_000)
    with bounded(4, 1000):
        loop(50_000)
    with pytest.raises(Exceeded, match="more to compute"), bounded(4, 1000):
        loop(10**9)
    loop(500_000)
    assert sys.gettrace() is None


def test_imports_are_not_counted(monkeypatch, tmp_path):
    """The first model of a family imports its modules, and what these import."""
    (tmp_path / "counts_much.py").write_text("x = [i for i in range(200_000)]\nimport counts_more\n")
    (tmp_path / "counts_more.py").write_text("y = {i: i for i in range(200_000)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "LINES", 100_000)
    with bounded(4, 1000):
        __import__("counts_much")
    with pytest.raises(Exceeded), bounded(4, 1000):
        _import_and_count()


def _import_and_count():
    with contextlib.suppress(ImportError):
        __import__("that_is_not_there")
    [i for i in range(10**9)]  # noqa: C416


def test_a_debugger_keeps_its_trace():
    def mine(frame, event, arg):
        return None

    sys.settrace(mine)
    try:
        with bounded(4, 1000):
            assert sys.gettrace() is mine
        assert sys.gettrace() is mine
    finally:
        sys.settrace(None)


def test_other_threads_are_not_bounded():
    with bounded(4, 1000):
        errors = []
        thread = threading.Thread(target=lambda: errors.append(Deep(10_000)))
        thread.start()
        thread.join()
        Deep(10)
    assert errors


def _nested(after):
    Deep(1500)
    with bounded(4, 1000):
        Deep(1500)
    Deep(after)


def test_bounds_inside_bounds_are_their_own():
    with bounded(4, 1000):
        _nested(after=500)
    with pytest.raises(Exceeded), bounded(4, 1000):
        _nested(after=600)


class Random(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        if how == "buffer":
            self.register_buffer("noise", torch.rand(4), persistent=False)
        elif how == "of a buffer":
            self.register_buffer("noise", 2 * torch.empty(4).normal_() + self.table, persistent=False)
        elif how == "of a weight":
            self.noise = self.linear.weight.detach().clone()
        elif how == "persistent":
            self.register_buffer("noise", torch.rand(4))


@pytest.mark.parametrize("how", ["buffer", "of a buffer", "of a weight"])
def test_random_values_that_no_state_holds_are_named(how):
    with bounded(4, 1000) as build, torch.device("meta"):
        net = nn.Sequential(Random(how))
    assert build.drawn_outside_state(net) == ["0.noise"]


@pytest.mark.parametrize("how", ["persistent", "none"])
def test_random_values_of_the_state_are_the_files(how):
    with bounded(4, 1000) as build, torch.device("meta"):
        net = Random(how)
    assert not build.drawn_outside_state(net)


def test_a_bounded_build_keeps_no_memory():
    with bounded(4, 1000):
        Deep(10)
    tracemalloc.start()
    for _ in range(20):
        with bounded(4, 1000):
            Deep(10)
    assert tracemalloc.get_traced_memory()[0] < 2e5
    tracemalloc.stop()
    assert len(module._hooked) == 1
