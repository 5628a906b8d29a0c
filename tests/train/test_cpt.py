"""Cyclic precision: the schedule, and that fine-tuning ends at the policy."""

import copy

import pytest
import torch

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.quantizers import LSQ
from hub_mpq.train.cpt import CyclicPrecision, cyclic_bits


def test_the_schedule_is_the_papers():
    assert [cyclic_bits(t, 8, 2, 8) for t in range(9)] == [2, 2, 3, 4, 5, 6, 7, 8, 2]
    assert cyclic_bits(0, 10, 3, 3) == 3


def test_a_narrower_grid_keeps_the_range_and_trains_the_same_scale():
    x = torch.linspace(-2, 2, 4001)
    q = LSQ((6,), signed=True)
    q.init(6, torch.tensor([1.0 / 31]))
    assert len(q(x).unique()) == 64
    q.narrow(3)
    out = q(x)
    assert len(out.unique()) == 8
    assert float(out.max().detach()) == pytest.approx(1.0)
    out.sum().backward()
    assert q.shift.grad.abs().sum() > 0
    q.narrow(None)
    assert len(q(x).unique()) == 64
    u = LSQ((8,), signed=False)
    u.init(8, torch.tensor([1 / 128]), 128)
    u.narrow(4)
    low, high = u(x).detach().aminmax()
    assert float(low) == pytest.approx(-1.0, abs=0.15)
    assert float(high) == pytest.approx(1.0, abs=0.15)
    assert 0.0 in u(x).tolist()


def test_fine_tuning_cycles_and_ends_at_the_policy(net, train):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).apply_policy("W6A6", train)
    seen = []
    layer = mpq.model[3]
    layer.register_forward_hook(lambda *_: seen.append((layer.training, layer.weight_quantizer._narrow)))
    mpq.finetune(train, steps=12, cyclic_bits=3, cycles=2, lr=1e-3)
    trained = [bits for training, bits in seen if training]
    assert {3, 4, 5} <= set(trained)
    assert trained[0] == trained[6] == 3
    assert trained[11] is None
    assert all(m._narrow is None for m in mpq.model.modules() if isinstance(m, LSQ))


def test_it_is_let_go_when_training_fails(net, train):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).apply_policy("W6A6", train)
    with torch.no_grad():
        mpq.model[0].weight.fill_(float("nan"))
    with pytest.raises(Exception, match="step 0"):
        mpq.finetune(train, steps=4, cyclic_bits=3)
    assert all(m._narrow is None for m in mpq.model.modules() if isinstance(m, LSQ))


def test_bad_settings(net):
    with pytest.raises(InvalidArgument, match="2 to 8"):
        CyclicPrecision(copy.deepcopy(net), 1)
    with pytest.raises(InvalidArgument, match=r"cyclic_bits must be an integer from 2 to 8, got 2\.5"):
        CyclicPrecision(copy.deepcopy(net), 2.5)
    for cycles in (0, -1, 1.5, True):
        with pytest.raises(InvalidArgument, match=f"cycles must be an integer of at least 1, got {cycles}"):
            CyclicPrecision(copy.deepcopy(net), 3, cycles)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cycles": 0}, "cycles must be an integer of at least 1, got 0"),
        ({"cyclic_bits": 2.5}, r"cyclic_bits must be an integer or None, got 2\.5"),
        ({"gradient_quantizer": "nonsense"}, "gradient_quantizer must be one of .*, got 'nonsense'"),
    ],
)
def test_fine_tuning_refuses_them_alone(options, match, net, train):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).apply_policy("W6A6", train)
    before = {k: v.clone() for k, v in mpq.model.state_dict().items()}
    with pytest.raises(InvalidArgument, match=match):
        mpq.finetune(train, steps=1, **options)
    assert all(torch.equal(before[k], v) for k, v in mpq.model.state_dict().items())
