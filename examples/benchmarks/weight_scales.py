"""Compare rules for the scale of a weight where nothing is known about the input of the layer.

    python examples/benchmarks/weight_scales.py

Top-1 of ResNet-20 (CIFAR-10, the first 3,000 test images) and MobileNetV1 (800 images of ImageNet), calibrated only:
inputs on training batches, BatchNorm statistics re-estimated for each rule. Rules: "fourth power" of the error, the
default; "squares", the default until 2026-11-28.
"""

from __future__ import annotations

import argparse
from itertools import islice

import tasks
import torch

from hub_mpq.nn.quantize import quantized_layers
from hub_mpq.quantizers import weight_scale_mse
from hub_mpq.train.norms import reestimate_batch_norm


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, batches in (("resnet20", 8), ("mobilenetv1", 16)):
        task = tasks.TASKS[name]
        mpq = task.build()
        test = list(islice(tasks.cifar_test(), 6)) if name == "resnet20" else list(tasks.imagenet_test())
        calibration = list(islice(task.train(0), batches))
        for level in ("W4A4", "W3A4", "W2A4"):
            mpq.apply_policy(level, calibration)
            floats = mpq.float_model.state_dict()
            start = {key: value.clone() for key, value in mpq.model.state_dict().items()}
            for rule in ("fourth power", "squares"):
                mpq.model.load_state_dict(start)
                if rule == "squares":
                    for _, layer in quantized_layers(mpq.model):
                        bits = layer.weight_quantizer.widths[0]
                        layer.weight_quantizer.init(bits, weight_scale_mse(layer.weight, bits))
                    mpq.model.load_state_dict({k: v for k, v in floats.items() if "running" in k}, strict=False)
                    reestimate_batch_norm(mpq.model, calibration, limit=16)
                mpq.model.eval()
                with torch.no_grad():
                    hits = [float((mpq.model(x).argmax(-1) == y).float().sum()) for x, y in test]
                print(name, level, rule, f"{100 * sum(hits) / sum(len(y) for _, y in test):.2f}", flush=True)


if __name__ == "__main__":
    main()
