"""Train the indicators of a timm model on a folder of images, in one or several processes.

    python examples/train_indicators.py resnet18 --data imagenet/train --output resnet18.safetensors
    accelerate launch --multi_gpu --num_processes 8 examples/train_indicators.py resnet18 --data imagenet/train …
    OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \\
        --dynamo_backend no --main_process_port 0 examples/train_indicators.py resnet18 --data imagenet/train …

The last command is for CPUs, where `--cpu` would start one process only, whatever the number. `--batch-size` is per
process. An interrupted run is resumed from OUTPUT.states with `--resume`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from hub_mpq import Engine, HubMPQ
from hub_mpq.data import data_config, image_loader
from hub_mpq.pack import write_indicators
from hub_mpq.train.processes import describe, on_main, world


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="name of a timm model")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per class")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file of the indicators")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: one epoch")
    parser.add_argument("--batch-size", type=int, default=64, help="images per process and step")
    parser.add_argument("--side", type=int, default=224, help="image size in pixels")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes")
    parser.add_argument("--no-pretrained", action="store_true", help="start from random weights")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run")
    given = parser.parse_args(argv)

    processes = describe()  # joins the processes, so it comes before anything that may differ between them
    if world()[0] == 0:
        print(processes, flush=True)
    torch.manual_seed(0)  # for weights that are initialized at random
    size = (3, given.side, given.side)
    mpq = HubMPQ.from_pretrained(
        given.model, pretrained=not given.no_pretrained, input_size=size, num_classes=given.classes
    )
    if torch.cuda.is_available():
        mpq.model.to("cuda")
    config = data_config(mpq.source.preprocess, mpq.graph.input_shape)
    train = image_loader(given.data, config, train=True, classes=given.classes, batch_size=given.batch_size)
    indicators = mpq.train_indicators(
        train,
        steps=given.steps,
        checkpoint_dir=given.output.with_name(given.output.name + ".states"),
        checkpoint_every=given.checkpoint_every,
        resume=given.resume,
        engine=Engine(bf16=given.bf16),
    )
    on_main(lambda: write_indicators(given.output, indicators))
    if world()[0] == 0:
        print(f"wrote the indicators of {len(indicators.weight)} layers to {given.output}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
