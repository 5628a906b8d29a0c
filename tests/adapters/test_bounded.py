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
    with pytest.raises(Exceeded, match="more modules than a file of 1000 bytes can hold"), bounded(4, 1000):
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


class Tables(nn.Module):
    """Layers with a mask each that no state dict has, as a plain attribute or as a buffer; or all with one."""

    def __init__(self, how, count=200, shared=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))
        mask = torch.ones(1024, 1024)
        for layer in self.layers:
            one = mask if shared else torch.ones(1024, 1024)
            if how == "buffer":
                layer.register_buffer("mask", one, persistent=False)
            else:
                layer.mask = one


@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_tables_beside_the_state_are_bounded_together(how):
    with pytest.raises(Exceeded, match="larger tables"), bounded(4, 1000) as build, torch.device("meta"):
        build.check_beside(Tables(how))
    with bounded(4, 1000) as build, torch.device("meta"):
        build.check_beside(Tables(how, count=20))
        build.check_beside(Tables(how, shared=True))
    with bounded(400, 10_000_000) as build, torch.device("meta"):  # a large file may be of a large network
        build.check_beside(Tables(how))


def _lists(many):
    out = []
    for _ in range(many):
        out.extend(["x"] * 100_000)
    return out


needs_proc = pytest.mark.skipif(not module._process()[0], reason="the system does not tell what memory a process has")


@needs_proc
def test_lists_of_python_are_refused_while_they_grow():
    with bounded(4, 1000):
        _lists(10)
    with pytest.raises(Exceeded, match="more memory"), bounded(4, 1000):
        _lists(10_000)  # 8 GB


class _Entered:
    """A context manager whose end takes many lines of Python."""

    def __init__(self):
        self.left = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for _ in range(20_000):
            self.left += 1


@pytest.mark.parametrize("before", [5_000, 90_000, 10**9])
def test_what_is_entered_is_left_whatever_is_exceeded(before, monkeypatch):
    monkeypatch.setattr(module, "LINES", 100_000)
    entered = _Entered()
    with contextlib.suppress(Exceeded), bounded(4, 1000), entered:
        [i for i in range(before)]  # noqa: C416
    assert entered.left == 20_000


@needs_proc
def test_memory_that_another_thread_takes_is_not_counted():
    held = []

    def other():
        for _ in range(400):  # 400 MB
            held.append(torch.ones(1 << 18))

    thread = threading.Thread(target=other)
    with bounded(400, 1000):
        thread.start()
        while thread.is_alive():
            Deep(1)
            thread.join(0.001)
    assert len(held) == 400


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
