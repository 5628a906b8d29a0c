"""Compare a timm model on ImageNet: float, calibrated, uniform and mixed precision, saved and loaded again.

    python examples/imagenet.py --data IMAGENET --model resnet18 --bitops W4A4

IMAGENET holds the folders train/ and val/, with one folder per class. If these are a subset of the model's classes, it
also holds classes.txt, with one folder name per line in label order. Custom models work the same way: `mobilenetv1_075`
has no timm name, so it is loaded with HubMPQ.from_module and `--checkpoint FILE`.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from hub_mpq import Candidates, HubMPQ
from hub_mpq.core import human
from hub_mpq.data import data_config, image_loader
from hub_mpq.report import table
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, fit

SMALL_MOBILENET = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 0.875}


def mobilenetv1_075(checkpoint: str | None) -> nn.Module:
    """Build MobileNetV1 with 0.75 of the channels, which timm's builder supports, but `timm.create_model` does not."""
    from timm.models.efficientnet import _gen_mobilenet_v1

    net = _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.75, pad_type="same", bn_eps=1e-3)
    if checkpoint:
        net.load_state_dict(load_file(checkpoint))
    return net.eval()


def load(args: argparse.Namespace) -> tuple[HubMPQ, Any]:
    """Return the model and the configuration of its preprocessing."""
    shape = (3, args.size, args.size)
    if args.model == "mobilenetv1_075":
        net = mobilenetv1_075(args.checkpoint)
        return HubMPQ.from_module(net, torch.randn(1, *shape), model_id=args.model), data_config(SMALL_MOBILENET, shape)
    mpq = HubMPQ.from_pretrained(args.model, checkpoint_path=args.checkpoint, pretrained=not args.checkpoint)
    return mpq, data_config(mpq.source.preprocess, shape)


def joint_over_float(mpq: HubMPQ, batches: list[Any], rounds: int = 3) -> list[float]:
    """Measure the time of a joint step relative to n + 1 float steps; both runs alternate on the same batches."""
    ratios = []
    widths = len(Candidates().weight)
    for _ in range(rounds):
        plain = Finetune(task=Classification(), lr=1e-4, scale_lr=0.0, weight_decay=0.0, smoothing=0.1)
        float_step = fit(copy.deepcopy(mpq.float_model), plain, batches, steps=len(batches)).step_seconds
        probe = HubMPQ(mpq.source)
        joint_step = probe.train_indicators(batches, steps=len(batches)).provenance["step_seconds"]
        ratios.append(joint_step / ((widths + 1) * float_step))
    return sorted(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with train/ and val/")
    parser.add_argument("--model", default="resnet18", help="timm name, or mobilenetv1_075")
    parser.add_argument("--checkpoint", help="safetensors file with the float weights")
    parser.add_argument("--bitops", default="W4A4", help="budget, a bit-width level")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--indicator-steps", type=int, default=60, help="steps of the indicator training")
    parser.add_argument("--indicator", choices=("divergence", "scale", "raw scale"), help="default: divergence")
    parser.add_argument("--steps", type=int, default=120, help="fine-tuning steps")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of fine-tuning")
    parser.add_argument("--distill", type=float, default=1.0, help="weight of distillation, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("imagenet-mpq"), help="folder of the packed model")
    args = parser.parse_args()

    mpq, config = load(args)
    labels = args.data / "classes.txt"
    options = {"class_map": labels if labels.exists() else None, "batch_size": args.batch_size, "seed": args.seed}
    train = image_loader(args.data / "train", config, train=True, **options)
    val = image_loader(args.data / "val", config, train=False, **options)
    rows: list[list[str]] = []

    def row(name: str, seconds: float) -> None:
        figures = mpq.evaluate(val)
        usage = mpq.usage().amounts if mpq.policy else {"bitops": float_bitops(mpq), "size": float_bytes(mpq)}
        rows.append([name, f"{figures['top1']:.2f}", human(usage["bitops"]), f"{int(usage['size'])}", f"{seconds:.1f}"])
        print(rows[-1], flush=True)

    def tuned(policy: Any) -> float:
        began = time.perf_counter()
        mpq.apply_policy(policy, train, reestimate_norms=False)
        mpq.finetune(train, steps=args.steps, lr=args.lr, distill=args.distill, seed=args.seed)
        return time.perf_counter() - began

    row("float", 0.0)
    began = time.perf_counter()
    mpq.apply_policy("W8A8", train)
    row("W8A8, calibrated only", time.perf_counter() - began)
    indicators = mpq.train_indicators(train, steps=args.indicator_steps, seed=args.seed, indicator=args.indicator)
    result = mpq.search(bitops=args.bitops)
    row(f"uniform {args.bitops}, fine-tuned", tuned(args.bitops))
    row(f"mixed at {args.bitops}, fine-tuned", tuned(result.policy))
    mpq.result = result
    mpq.save_pretrained(args.output)
    again = HubMPQ.from_pretrained(args.output, module=mpq.float_model)
    batch = next(iter(val))[0]
    with torch.no_grad():
        equal = torch.equal(again(batch), mpq(batch))
    print(table(["model", "top-1", "BitOps", "bytes", "seconds"], rows))
    print(f"indicators: {args.indicator_steps} steps, {mpq.seconds['indicators']:.1f} s")
    print(f"scales moved: {indicators.provenance['movement']}")
    print(f"search: {result.seconds * 1000:.1f} ms, {result.status}, gap {result.gap}")
    print(f"reloaded logits equal: {equal}")
    low, middle, high = joint_over_float(mpq, [batch for batch, _ in zip(train, range(6), strict=False)])
    print(f"time of a joint step / float steps of the same passes: {middle:.3f} ({low:.3f} to {high:.3f})")


def float_bitops(mpq: HubMPQ) -> float:
    return 1024 * (sum(x.macs for x in mpq.graph) + sum(op.macs for op in mpq.graph.floats))


def float_bytes(mpq: HubMPQ) -> float:
    return sum(t.numel() * t.element_size() for t in mpq.float_model.state_dict().values())


if __name__ == "__main__":
    main()
