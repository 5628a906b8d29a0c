"""What the tests run alone and as two processes: python scenarios.py OUTPUT, started by Accelerate's launcher.

Every scenario gives JSON values; OUTPUT/<rank>.json holds {scenario: them}.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import torch
from process_toys import COUNTS, STILL, X, _net, loader, rounded, samples
from sharding import fsdp, unsharded
from torch.utils.data import DataLoader

from hub_mpq import HubMPQ
from hub_mpq.core import Candidates, Engine, Indicators
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.nn.calibrate import sample_inputs
from hub_mpq.search.limpq import LIMPQ
from hub_mpq.search.train_scores import train_scores
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, evaluate, fit
from hub_mpq.train.norms import reestimate_batch_norm
from hub_mpq.train.processes import own_share, world


class Likeliest(Classification):
    """What a model's scores are read from is the same however the samples are spread: its likeliest labels."""

    def sample(self, output, generator):
        return self.logits(output).detach().argmax(-1)


class Watched(LIMPQ):
    """Frozen norms, and what every step's gradients and widths were."""

    def begin_step(self, model, step, total):
        for name in self.norms:
            model.get_submodule(name).eval()
        for module in (model[1],):
            module.eval()

    def losses(self, model, batch, rng):
        if world()[1] > 1 and not hasattr(self, "reductions"):
            self.reductions = []
            model.register_comm_hook(None, self._reduce)
        for self.number, pair in enumerate(super().losses(model, batch, rng)):
            yield pair
        self.number = None

    def _reduce(self, state, bucket):
        self.reductions.append(self.number)
        done = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda future: future.value()[0] / world()[1])

    def before_step(self, model, step):
        self.grads = getattr(self, "grads", [])
        self.grads.append({n: p.grad.flatten().tolist() for n, p in model.named_parameters() if p.grad is not None})
        self.drawn = getattr(self, "drawn", [])
        self.drawn.append([m.weight_quantizer.spec.num_bits for m in self.layers.values()])


def gradients(folder):
    out = {}
    for count in COUNTS:
        model = _net()
        graph = HubMPQ.from_module(_net(), X).graph
        strategy = Watched(indicator="scale")
        strategy.loss = Finetune(**STILL)
        strategy.attach(model, graph, {x.name: Candidates.of([2, 4]) for x in graph.searched}, {"4": "3", "7": "6"})
        known = [samples(32).tensors[0]]
        strategy.calibrate(model, known, sample_inputs(model, known, strategy.loss.task.forward))
        log = fit(model, strategy, loader(count), epochs=1)
        out[str(count)] = {
            "grads": strategy.grads,
            "drawn": strategy.drawn,
            "reductions": getattr(strategy, "reductions", None),
            "passes": strategy.passes,
            "samples": log.samples,
            "loss": log.epoch_loss,
        }
    return out


def indicators(folder):
    """A loader that each process shuffles with a global generator of its own, unless the library prevents it."""
    out = {}
    torch.manual_seed(world()[0])
    for name, options in {
        "start": {"steps": 0, "indicator": "scale"},
        "growth": {"steps": 0},
        "trained": {"steps": 4},
    }.items():
        found = HubMPQ.from_module(_net(), X, task=Likeliest()).train_indicators(
            loader(shuffle=True), seed=3, **options
        )
        out[name] = {"weight": rounded(found.weight), "activation": rounded(found.activation)}
    for kind in ("scale", "raw scale"):
        plain = HubMPQ.from_module(_net(), X).train_indicators(loader(), steps=0, indicator=kind)
        out[f"ordered {kind}"] = {"weight": rounded(plain.weight), "activation": rounded(plain.activation)}
    mpq = HubMPQ.from_module(_net(), X)
    resolved = {x.name: Candidates.of([2, 4]) for x in mpq.graph.searched}
    for name in ("gradient", "mse"):
        got = train_scores(mpq.model, mpq.graph, {}, loader(), resolved, strategy=name, task=Likeliest())
        out[name] = {layer: {str(b): v for b, v in row.items()} for layer, row in got.pairs.items()}
    return out


def measured(folder):
    figures = evaluate(_net(), loader(44))
    fidelity = evaluate(_net(1), [batch[0] for batch in loader(44)][:3], reference=_net())
    lists = len(list(own_share([1, 2, 3, 4, 5])))
    net, x = _net(), samples(44).tensors[0]
    reestimate_batch_norm(net, own_share(x.split([16, 1, 3, 8, 16])))
    norm = [net[1].running_mean.tolist(), net[1].running_var.tolist()]
    return {"labels": figures, "fidelity": fidelity, "list": lists, "norm": norm}


def validated(folder):
    """What is measured before a policy is taken, by the main process alone; scores that are the same everywhere."""
    mpq = HubMPQ.from_module(_net(), X)
    rows = {x.name: {b: (i + 1) * 4.0**-b for b in (2, 3, 4, 5, 6)} for i, x in enumerate(mpq.graph.searched)}
    scores = Indicators(rows, rows, provenance={"unit": "kl", "task": "classification"})
    batches = DataLoader(samples(96), batch_size=16)
    options = {"train": batches, "val": DataLoader(samples(320, seed=2), batch_size=32), "indicators": scores}
    mpq.quantize(bitops="W3A3", steps=0, validate_seconds=600, **options)  # no limit strikes on a busy machine
    found = mpq.result
    return {
        "chosen_by": found.chosen_by,
        "policy": found.policy.to_dict()["bits"],
        "rows": [[row.name, row.divergence, row.samples] for row in found.measurements],
        "check": [found.check.spearman, found.check.slope],
        "forwards": found.validation.forwards,
    }


def bars(folder):
    """Whether this process shows a progress bar: None is tqdm's "where there is a terminal"."""
    from huggingface_hub.utils import tqdm

    shown, plain = [], tqdm.__init__

    def noted(self, *args, **options):
        shown.append(options["disable"])
        plain(self, *args, **options)

    tqdm.__init__ = noted
    try:
        fit(_net(), Finetune(**STILL), loader(), steps=1)
        evaluate(_net(), loader())
    finally:
        tqdm.__init__ = plain
    return shown


def tuned(folder):
    mpq = HubMPQ.from_module(_net(), X)
    mpq.apply_policy("W4A4", loader())
    mpq.finetune(loader(shuffle=True), steps=5, lr=1e-3, checkpoint_dir=folder / "tuned")
    state = mpq.model.state_dict()
    return {"state": {k: v.flatten().tolist() for k, v in state.items()}}


class Ends(Finetune):
    """One process alone is told to stop, or meets data that cannot be read."""

    def after_step(self, model, step):
        if step == 2 and world()[0] == world()[1] - 1:
            signal.raise_signal(signal.SIGTERM)


def stopped(folder):
    """SIGTERM reaches one process; then all go on together, and the end is that of an uninterrupted run."""
    options = {"steps": 7, "seed": 2, "checkpoint_dir": folder / "stopped"}
    moving = {**STILL, "lr": 1e-2, "scale_lr": 1e-2}
    whole, broken = _net(), _net()
    fit(whole, Finetune(**moving), loader(44, shuffle=True), steps=7, seed=2)
    said = ""
    try:
        fit(broken, Ends(**moving), loader(44, shuffle=True), **options)
    except KeyboardInterrupt as error:
        said = str(error).partition(";")[0]
    states = sorted(p.name for p in (folder / "stopped").iterdir())
    fit(broken, Finetune(**moving), loader(44, shuffle=True), **options, resume=True)
    equal = [torch.equal(a, b) for a, b in zip(whole.state_dict().values(), broken.state_dict().values(), strict=True)]
    return {"said": said, "states": states, "equal": all(equal)}


class Torn(torch.utils.data.Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        if 56 <= index < 64:  # of the eighth batch of eight: the second process's fourth
            raise HubMPQError(f"sample {index} is torn")
        return torch.zeros(1, 8, 8), 0


def errors(folder):

    out = {}
    for name, call in {
        "torn": lambda: fit(_net(), Finetune(**STILL), DataLoader(Torn(), batch_size=8), epochs=1),
        "ebs": lambda: HubMPQ.from_module(_net(), X).train_scores(loader(), strategy="ebs", steps=1),
        "fsdp": unsharded,
        "norms": lambda: fit(_net(), Finetune(**STILL), loader(), steps=1, engine=Engine(sync_batch_norm=True)),
        "few": lambda: fit(_net(), Finetune(**STILL), DataLoader(samples(4), batch_size=8), epochs=1),
    }.items():
        try:
            call()
        except (HubMPQError, InvalidArgument) as error:
            out[name] = str(error)
    return out


SCENARIOS = {f.__name__: f for f in (gradients, indicators, measured, validated, bars, tuned, stopped, errors, fsdp)}


def main() -> None:
    from hub_mpq.train.processes import describe

    folder = Path(sys.argv[1])
    device = describe()
    chosen = sys.argv[2:] or list(SCENARIOS)
    results = {"device": device, **{name: SCENARIOS[name](folder) for name in chosen}}
    (folder / f"{world()[0]}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
