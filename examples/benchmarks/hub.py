"""Bytes and seconds of publishing and pulling real models, against publishing the float model.

    python examples/benchmarks/hub.py [--models mobilenet resnet20]

A Hub stand-in on loopback (the one of tests/hub) takes real HTTP of the real client. Each model is quantized by
calibration on a few images, W4A4 with fixed layers at W8A8, pushed without and with its float copy, and pulled in a
fresh process by HubMPQ.from_pretrained(…, module=net), whose logits must be equal to the bit. Seconds over loopback
leave out any network: the bytes are what a network would carry. Accuracy is no subject here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "hub")]
LEVEL = {"mobilenet": "W4A4", "resnet20": "W4A4"}
CHILD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from nets import mobilenet_v1, resnet20
from hub_mpq import HubMPQ
name, repo, data = sys.argv[2:5]
net = mobilenet_v1(pretrained=False) if name == "mobilenet" else resnet20()
x, want = torch.load(data, weights_only=True)
began = time.perf_counter()
mpq = HubMPQ.from_pretrained(repo, module=net)
cold = time.perf_counter() - began
with torch.no_grad():
    equal = torch.equal(mpq(x), want)
began = time.perf_counter()
HubMPQ.from_pretrained(repo, module=net)
print(json.dumps({"equal": equal, "cold": cold, "warm": time.perf_counter() - began}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(LEVEL), choices=list(LEVEL))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "blobs").mkdir()
        from server import Hub
        from store import Store

        hub = Hub(Store(root / "blobs", {"token": ("me", True)}))
        # before huggingface_hub is imported: it reads them once
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
        os.environ |= {"HF_TOKEN": "token", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        try:
            print("| model | step | bytes up | bytes down | seconds |\n|---|---|---|---|---|")
            for name in args.models:
                measure(name, hub, root)
        finally:
            hub.close()


def measure(name: str, hub, root: Path) -> None:  # type: ignore[no-untyped-def]
    """Print the rows of one model; SystemExit when a pulled model answers otherwise than the pushed one."""
    import torch
    from huggingface_hub import HfApi
    from images import CIFAR_MEAN, CIFAR_STD, Images, cifar10, imagenet
    from nets import mobilenet_v1, resnet20
    from safetensors.torch import save_file

    from hub_mpq import HubMPQ

    torch.set_num_threads(1)
    if name == "mobilenet":
        net, (pixels, labels), norm = mobilenet_v1(), imagenet("val"), ((0.5,) * 3, (0.5,) * 3)
    else:
        net, (pixels, labels), norm = resnet20(), cifar10("test"), (CIFAR_MEAN, CIFAR_STD)
    x = torch.stack([row for row, _ in Images(pixels[:16], labels[:16], *norm).__getitems__(list(range(16)))])
    mpq = HubMPQ.from_module(net, x[:1], model_id=name).apply_policy(LEVEL[name], [x])
    with torch.no_grad():
        torch.save((x, mpq(x)), root / f"{name}.pt")
    save_file(net.state_dict(), root / "model.safetensors", metadata={"format": "pt"})
    api = HfApi(token="token")

    def push_float() -> None:
        api.create_repo(f"me/{name}-float")
        api.upload_file(
            path_or_fileobj=root / "model.safetensors", path_in_repo="model.safetensors", repo_id=f"me/{name}-float"
        )

    def row(step: str, call: Callable[[], object]) -> None:
        up, down, began = hub.bytes_up(), hub.bytes_down(), time.perf_counter()
        call()
        spent = time.perf_counter() - began
        print(f"| {name} | {step} | {hub.bytes_up() - up:,} | {hub.bytes_down() - down:,} | {spent:.2f} |")

    row("push the float model", push_float)
    row(f"push {LEVEL[name]}, packed", lambda: mpq.push_to_hub(f"me/{name}", token="token"))
    row("push the same again", lambda: mpq.push_to_hub(f"me/{name}", token="token"))
    row("push packed and float copy", lambda: mpq.push_to_hub(f"me/{name}-copy", token="token", float_copy=True))
    down = hub.bytes_down()
    command = [sys.executable, "-c", CHILD, str(HERE), name, f"me/{name}-copy", str(root / f"{name}.pt")]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    if not answer["equal"]:
        raise SystemExit(f"{name}: the pulled model answers otherwise than the pushed one")
    print(f"| {name} | pull, fresh process, logits equal | 0 | {hub.bytes_down() - down:,} | {answer['cold']:.2f} |")
    print(f"| {name} | pull again, warm cache | 0 | 0 | {answer['warm']:.2f} |")


if __name__ == "__main__":
    main()
