"""Calls that an engine was not traced for: from several threads, with other arguments, of other types and sizes."""

from __future__ import annotations

import sys
import threading
from importlib.machinery import ModuleSpec

import pytest
import torch
from runtime_toys import bert, noise, quantized, tokens
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.core import runtimes
from hub_mpq.errors import HubMPQError
from hub_mpq.export.onnx import missing_packages
from hub_mpq.runtime import to_runtime
from hub_mpq.runtime.engine import network_of

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
TensorProto = pytest.importorskip("onnx").TensorProto
ENGINES = pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])


class Scaled(nn.Module):
    """An argument that is no tensor changes the output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x, gain: float = 1.0):
        return self.head(self.conv(x).relu().mean((2, 3))) * gain


class Ids(nn.Module):
    """Token ids without a config."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.table(input_ids))


@pytest.fixture(scope="module")
def scaled():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return quantized(Scaled().eval(), "W4A4", noise(2, 3, 64, 64)).model


@pytest.fixture(scope="module")
def ids():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return quantized(Ids().eval(), "W4A4", torch.arange(14).view(2, 7)).model


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "onednn", "bit_serial"])
def test_threads_get_their_own_outputs(engine, scaled):
    if engine == "bit_serial":
        pytest.importorskip("numba")
    built = to_runtime(scaled, engine, noise(1, 3, 64, 64))
    batches = [noise(4, 3, 64, 64, seed=i) for i in range(8)]
    want, wrong = [built(x) for x in batches], []

    def calls(i):
        wrong.extend(i for _ in range(10) if not built(batches[i]).equal(want[i]))

    threads = [threading.Thread(target=calls, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@ENGINES
def test_an_argument_that_is_no_tensor_is_not_ignored(engine, scaled):
    x = noise(2, 3, 64, 64)
    built = to_runtime(scaled, engine, x)
    assert built(x, 1.0).equal(built(x))
    for args, words in (((x, 2.0), {}), ((x,), {"gain": 2.0}), ((x,), {"gain": [x]})):
        with pytest.raises(HubMPQError, match=r"unexpected argument gain=.*") as error:
            built(*args, **words)
        assert "\n" not in str(error.value)


@ENGINES
def test_token_ids_of_a_network_without_a_config(engine, ids):
    x = torch.arange(14).view(2, 7)
    built = to_runtime(ids, engine, x)
    longer = torch.arange(27).view(3, 9)
    with torch.no_grad():
        torch.testing.assert_close(built(longer), ids(longer))
    assert built(longer.int()).equal(built(longer))
    with pytest.raises(HubMPQError, match="unexpected input 'attention_mask'"):
        built(longer, torch.ones_like(longer))


@ENGINES
def test_what_the_graph_has_no_room_for_is_one_sentence(engine, scaled):
    built = to_runtime(scaled, engine, noise(1, 3, 64, 64))
    for x in (noise(1, 3, 32, 32), noise(3, 64, 64), noise(1, 3, 64, 64).bfloat16()):
        with pytest.raises(HubMPQError, match=r"cannot run inputs x \[.*built for x \[1, 3, 64, 64\] float32") as error:
            built(x)
        assert "\n" not in str(error.value)
    assert built(noise(0, 3, 64, 64)).shape == (0, 10)


class Through(nn.Module):
    """Returns one output twice, or its input as it is; does not read the other."""

    def __init__(self, input_too):
        super().__init__()
        self.head, self.input_too = nn.Linear(16, 16), input_too

    def forward(self, x, unread):
        y = self.head(x)
        return (y, x, y) if self.input_too else (y, y + 1, y)


@ENGINES
def test_outputs_that_are_one_tensor(engine):
    x = noise(3, 16)
    for input_too in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = (
                HubMPQ.from_module(Through(input_too).eval(), (x[:1], x[:1]))
                .apply_policy("W4A4", [((x, x), None)])
                .model
            )
        if input_too:
            with pytest.raises(HubMPQError, match="the model returns its input 'x' unchanged"):
                to_runtime(model, engine, (x, x))
        else:
            with torch.no_grad():
                torch.testing.assert_close(to_runtime(model, engine, (x, x))(x, x), model(x, x))


class Broken:
    """An installed package that cannot be loaded."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name in ("numba", "openvino", "onnxruntime", "onnx") else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise OSError("libfoo.so: cannot open")


def test_a_broken_package_is_a_reason(monkeypatch):
    for name in ("numba", "openvino", "onnxruntime", "onnx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in ("openvino", "onnxruntime", "bit_serial"):
        assert "libfoo.so" in runtimes.get(name).available()
    assert "libfoo.so" in missing_packages()


@ENGINES
def test_tables_of_embeddings_stay_integers(engine):
    mpq = quantized(bert(vocab_size=500), "W7A8", tokens())
    built = to_runtime(mpq.model, engine, tokens())
    large = [x for x in network_of(built).take_graph().proto.graph.initializer if list(x.dims) == [500, 32]]
    assert [x.data_type for x in large] == [TensorProto.INT8]
    with torch.no_grad():
        want, got = mpq.model(**tokens()).logits, built(**tokens()).logits
    assert (got - want).norm() < 0.05 * want.norm()
    assert "bert.embeddings.word_embeddings" in built.runtime_layers.float
