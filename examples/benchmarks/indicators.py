"""What a learned scale says about its layer: calibrated ResNet-20, and the authors' ResNet-50 indicators.

    python examples/benchmarks/indicators.py --golden
    python examples/benchmarks/indicators.py --powers
    python examples/benchmarks/indicators.py --level W2A2 --level W3A3
    python examples/benchmarks/indicators.py --level W2A2 --steps 60

Every policy has the BitOps of the uniform level and is calibrated, BatchNorms included, but not trained. Accuracy is on
3,000 evenly spaced test images of CIFAR-10. The network starts from its published weights, with `--start short` after
250 float steps on the JPEG form of CIFAR-10, or with `--start lifted` from the weights of the study. With --steps,
scales per tensor are omitted. `--powers` shows the relative power at 1 bit; `--golden` needs no data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import images
import nets
import numpy as np
import timm
import torch
from tasks import _float_once, cifar_train, lifted_resnet20
from torch import Tensor, nn

from hub_mpq import Candidates, HubMPQ, Indicators, Policy
from hub_mpq.nn.calibrate import sample_inputs
from hub_mpq.quantizers import LSQ
from hub_mpq.quantizers.calibrate import activation_scale, weight_scale_mse, weight_scale_sigma
from hub_mpq.search.movement import rank_correlation
from hub_mpq.search.scores import balance

CANDIDATES = {"W2A2": (1, 2, 3, 4), "W3A3": (2, 3, 4, 5, 6)}
GOLDEN = Path(__file__).parents[2] / "tests" / "solve" / "golden_limpq_resnet50.json"
Batches = Sequence[tuple[Tensor, Tensor]]


def sensitivities(net: nn.Module, names: Iterable[str], batches: Batches) -> dict[str, tuple[float, float]]:
    """Return {layer: (of its weight, of its input)}: nats of KL divergence per sample and unit of relative power.

    White noise of power s²/12 = rms²/12 · (s/rms)² on an operand moves the output by ½ · s²/12 · tr F nats, where F is
    the Fisher information. Gradients of different samples are uncorrelated when their labels are drawn from the model,
    so the squared norm of the summed gradient of a batch is tr F times its samples: one backward per batch for all
    layers. This is our construction.
    """
    generator = torch.Generator().manual_seed(0)
    read: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> tuple[Tensor]:
        # a separate tensor: the gradient through this layer only, not through a parallel shortcut
        read[name] = x * 1
        read[name].retain_grad()
        return (read[name],)

    layers = {name: net.get_submodule(name) for name in names}
    handles = [m.register_forward_pre_hook(lambda _, x, n=n: keep(n, x[0])) for n, m in layers.items()]
    found, samples = dict.fromkeys(layers, (0.0, 0.0)), 0
    for x, _ in batches:
        net.zero_grad(set_to_none=True)
        said = net(x.clone().requires_grad_()).log_softmax(-1)
        drawn = torch.multinomial(said.detach().exp(), 1, generator=generator)
        (-said.gather(1, drawn).sum()).backward()
        samples += len(x)
        for name, module in layers.items():
            both = [
                float(t.detach().square().mean()) * float(t.grad.square().sum()) for t in (module.weight, read[name])
            ]
            found[name] = found[name][0] + both[0], found[name][1] + both[1]
    for handle in handles:
        handle.remove()
    net.zero_grad(set_to_none=True)
    return {name: (w / samples / 24, a / samples / 24) for name, (w, a) in found.items()}


def with_sensitivity(powers: Indicators, found: dict[str, tuple[float, float]]) -> Indicators:
    """Return relative powers times the sensitivity of their layer, in nats."""
    weight, activation = (
        {name: {b: v * found[name][side] for b, v in row.items()} for name, row in rows.items()}
        for side, rows in enumerate((powers.weight, powers.activation))
    )
    return replace(powers, weight=weight, activation=activation)


@torch.no_grad()
def top1(net: nn.Module, batches: Batches) -> Tensor:
    return torch.cat([(net(x).argmax(-1) == y).float().mul(100) for x, y in batches])


def measure(start: str, level: str, steps: int, count: int = 3000) -> None:
    """Print a table of the accuracy of each indicator's policy, calibrated only."""
    net = start_of(start)
    # the file is sorted by class: its first images would be of three classes only
    pixels, labels = (t[torch.arange(count) * len(t) // count] for t in images.cifar10("test"))
    test = list(images.loader(images.Images(pixels, labels, images.CIFAR_MEAN, images.CIFAR_STD), 500))
    plain = images.Images(*images.cifar10("train"), images.CIFAR_MEAN, images.CIFAR_STD)
    calibration = list(islice(images.loader(plain, 128, seed=0), 16))
    mpq = HubMPQ.from_module(net, calibration[0][0][:1], model_id="resnet20")
    uniform = Policy.uniform(mpq.graph, level)
    known: dict[str, Tensor] = {}

    def row(name: str, policy: Policy) -> None:
        key = json.dumps({n: str(b) for n, b in policy.bits.items()})
        if key not in known:
            known[key] = top1(mpq.apply_policy(policy, calibration).model, test)
        items, equal = known[key], known[json.dumps({n: str(b) for n, b in uniform.bits.items()})]
        gain = items - equal
        widths = " ".join(f"{policy.bits[x.name].weight}/{policy.bits[x.name].activation}" for x in mpq.graph.searched)
        error = float(gain.std()) / len(gain) ** 0.5
        print(f"| {name} | {items.mean():.2f} | {gain.mean():+.2f} ± {error:.2f} | {widths} |", flush=True)

    def learn(**options: Any) -> Indicators:
        batches = cifar_train(0, 64) if steps else calibration
        return mpq.train_indicators(batches, steps=steps, candidates=Candidates.of(CANDIDATES[level]), **options)

    def search(name: str, scores: Indicators, alpha: float | None = None) -> None:
        mpq.scores = scores
        row(name, mpq.search(bitops=level, alpha=alpha).policy)

    float_top1 = float(top1(net, test).mean())
    print(f"\n### {level}, {steps} joint steps, start {start}, float {float_top1:.2f}\n")
    print("| indicator | top-1 | minus uniform, standard error | weight/input bit-widths |\n|---|---|---|---|")
    row("uniform", uniform)
    search("raw scale", learn(indicator="raw scale"))
    found = sensitivities(net, [x.name for x in mpq.graph.searched], calibration[:8])
    for granularity in ("channel",) if steps else ("tensor", "channel"):
        powers = learn(indicator="scale", granularity=granularity)
        search(f"relative power, {granularity}, α = 1", powers, 1.0)
        search(f"relative power, {granularity}, balanced α = {balance(powers):.2f}", powers, balance(powers))
        search(f"relative power times sensitivity, {granularity}", with_sensitivity(powers, found), 1.0)
    search("default", learn())


def start_of(start: str) -> nn.Module:
    if start == "lifted":
        return lifted_resnet20()
    if start == "short":
        settings: dict[str, Any] = {"lr": 0.01, "steps": 250, "optimizer": "sgd"}
        return _float_once("resnet20-jpeg-250", nets.resnet20(), lambda: cifar_train(0), **settings)
    return nets.resnet20()


def powers(start: str) -> None:
    """Print (s/rms)² of calibrated scales and the measured error in the same unit, 1 to 4 bits, means over layers."""
    net, widths = start_of(start), (1, 2, 3, 4)
    plain = images.Images(*images.cifar10("train"), images.CIFAR_MEAN, images.CIFAR_STD)
    x = next(iter(images.loader(plain, 128, seed=0)))[0]
    names = [x.name for x in HubMPQ.from_module(net, x[:1]).graph.searched]
    inputs = sample_inputs(net, [x], lambda model, batch: model(batch), names)
    weights = {name: net.get_submodule(name).weight.detach() for name in names}

    def weight_start(mse: bool) -> Callable[[Tensor, int], tuple[Tensor, int]]:
        return lambda w, b: ((weight_scale_mse(w, b, axis=None) if mse or b == 1 else weight_scale_sigma(w, b)), 0)

    head = ["tensor, start", "value", *(f"{b} bits" for b in widths), "layers with more at 1 bit than at 2"]
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, mse in (("the authors'", False), ("least squared error", True)):
        for side, tensors, signed, scale_of in (
            ("weights", weights, True, weight_start(mse)),
            ("inputs", inputs, False, lambda v, b, mse=mse: activation_scale(v, b, mse=mse)),
        ):
            scale, error = [], []
            for tensor in tensors.values():
                quantizer, v = LSQ(widths, signed=signed), tensor.flatten()[None]
                power = float(v.square().mean())
                for bits in widths:
                    quantizer.init(bits, *scale_of(v, bits))
                    quantizer.set_width(bits)
                    scale.append(float(quantizer.scale.detach()) ** 2 / power)
                    error.append(12 * float((quantizer(v) - v).detach().square().mean()) / power)
            for value, flat in (("(s/rms)²", scale), ("12 · error²/rms²", error)):
                table = np.array(flat).reshape(-1, len(widths))
                cells = " | ".join(f"{v:.3f}" for v in table.mean(0))
                falls = f"{int((table[:, 0] > table[:, 1]).sum())} of {len(table)}"
                print(f"| {side}, {name} | {value} | {cells} | {falls} |")
            table = np.array(scale).reshape(-1, len(widths))
            guess = table[:, 1] ** 2 / table[:, 2]
            print(f"| {side}, {name} | extrapolated from 2 and 3 bits | {guess.mean():.3f} | | | | |")


def golden() -> None:
    """Print Spearman of the authors' trained ResNet-50 indicators with properties of the 52 layers."""
    layers = json.loads(GOLDEN.read_text())["layers"]
    net = timm.create_model("resnet50", pretrained=False)
    facts = {
        "weights": [row["weight_count"] for row in layers.values()],
        "MACs": [row["macs_unfloored"] for row in layers.values()],
        "fan-in": [net.get_submodule(n).weight[0].numel() for n in layers],
        "fan-out": [len(net.get_submodule(n).weight) for n in layers],
        "depth": list(range(len(layers))),
        "stage": [int(n[5]) for n in layers],
    }
    table = {
        side: {b: np.array([row[side][str(b)] for row in layers.values()]) for b in (2, 3, 4, 5, 6)}
        for side in ("weight", "activation")
    }
    facts |= {"its own ratio of 2 to 3 bits": [], "its own ratio of 2 to 6 bits": []}
    heads = " | ".join(facts)
    print(f"\n| scale | {heads} | slope over log fan-in | R² |\n|" + "---|" * (len(facts) + 3))
    for side, rows in table.items():
        facts["its own ratio of 2 to 3 bits"] = rows[2] / rows[3]
        facts["its own ratio of 2 to 6 bits"] = rows[2] / rows[6]
        for bits, values in rows.items():
            cells = [f"{rank_correlation(values, np.array(fact, dtype=float)):+.2f}" for fact in facts.values()]
            x, y = np.log(np.array(facts["fan-in"], dtype=float)), np.log(values)
            slope = np.polyfit(x, y, 1)[0]
            r2 = np.corrcoef(x, y)[0, 1] ** 2
            print(f"| {side}, {bits} bits | {' | '.join(cells)} | {slope:+.2f} | {r2:.2f} |")
    print(
        "\nWeights against inputs of the same layer: "
        + ", ".join(
            f"{b} bits {rank_correlation(table['weight'][b], table['activation'][b]):+.2f}" for b in table["weight"]
        )
    )
    for side, rows in table.items():
        pairs = ", ".join(f"{b} to 2 bits {rank_correlation(rows[b], rows[2]):+.2f}" for b in (3, 4, 5, 6))
        print(f"Rank correlation between bit-widths, {side}: {pairs}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=sorted(CANDIDATES), action="append", default=[], help="budget")
    parser.add_argument("--steps", type=int, default=0, help="joint steps before the scales are read")
    parser.add_argument(
        "--start", choices=("published", "short", "lifted"), default="published", help="weights to start from"
    )
    parser.add_argument("--golden", action="store_true", help="the authors' ResNet-50 indicators")
    parser.add_argument("--powers", action="store_true", help="relative powers and measured errors at 1 to 4 bits")
    args = parser.parse_args()
    if args.golden:
        golden()
    if args.powers:
        powers(args.start)
    for level in args.level:
        measure(args.start, level, args.steps)


if __name__ == "__main__":
    main()
