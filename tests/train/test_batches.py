"""What a training does with the user's loader, and what it leaves of it."""

import copy
import math
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from hub_mpq.data.order import Shuffled
from hub_mpq.errors import TrainingDiverged
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, evaluate, fit
from hub_mpq.train.processes import own_share

RATES = {"task": Classification(), "lr": 1e-2, "scale_lr": 1e-3, "weight_decay": 0.0, "smoothing": 0.0}


def hooks():
    return Finetune(**RATES)


class Interrupted(Finetune):
    """Raises what Ctrl-C raises, after a given step."""

    stop_after = 5

    def after_step(self, model, step):
        if step + 1 == self.stop_after:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffled_loader_stays_the_users(net, data, own):
    """Its sampler, the samples and the state of its generator; by whatever reads it."""
    generator = torch.Generator().manual_seed(5) if own else None
    loader = DataLoader(data, batch_size=16, shuffle=True, generator=generator)
    sampler, before = loader.batch_sampler.sampler, generator and generator.get_state()
    shared = own_share(loader, seed=3)
    orders = [next(iter(reader))[0] for reader in (shared, own_share(loader, seed=3), own_share(loader, seed=4))]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    fit(net, hooks(), loader, epochs=2)
    assert own is False or torch.equal(generator.get_state(), before)
    evaluate(net, loader)
    assert loader.batch_sampler.sampler is loader.sampler is sampler
    assert type(sampler) is torch.utils.data.RandomSampler
    assert sampler.generator is generator


def test_a_loader_is_at_epoch_0_after_a_training_however_it_ended(net, data):
    order = Shuffled(len(data), seed=1)
    loader = DataLoader(data, batch_size=16, sampler=order)
    first = next(iter(loader))[0]
    fit(net, hooks(), loader, epochs=3)
    assert torch.equal(next(iter(loader))[0], first)
    with pytest.raises(TrainingDiverged):
        fit(net, Poison(**RATES), loader, epochs=3)
    assert torch.equal(next(iter(loader))[0], first)


class Poison(Finetune):
    """Spoils the weights in the second epoch of six batches."""

    def after_step(self, model, step):
        if step == 8:
            with torch.no_grad():
                model[0].weight.fill_(math.nan)


@pytest.mark.parametrize("kind", ["DataLoader", "iterable"])
@pytest.mark.parametrize("stop", [5, 6, 12, 15])
def test_a_stream_that_began_again_is_resumed_where_it_was(net, data, kind, stop, tmp_path):
    """Six batches a pass."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    class Batches:
        def __iter__(self):
            return iter(DataLoader(data, batch_size=16))

    stream = DataLoader(Stream(), batch_size=16) if kind == "DataLoader" else Batches()
    twin = copy.deepcopy(net)
    fit(net, hooks(), stream, steps=17)
    broken = Interrupted(**RATES)
    broken.stop_after = stop
    with pytest.raises(KeyboardInterrupt):
        fit(twin, broken, stream, steps=17, checkpoint_dir=tmp_path)
    fit(twin, hooks(), stream, steps=17, checkpoint_dir=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))
