"""Speed and memory of generation: decoders quantized, published, pulled and run in a fresh process.

    python examples/benchmarks/generation.py
    python examples/benchmarks/generation.py --row "smollm2 W4 128"
    python examples/benchmarks/generation.py --report

SmolLM2-135M with its embedding (which is also its head) in float, and tiny mixtures of experts with random weights and
all layers quantized; weights only, by GPTQ. The Hub is a stand-in on loopback. The fresh process generates greedily
with packed weights resident, then with float ones; its tokens must be those of the pushed model. Speed is tokens per
CPU-second of one thread after a prompt of 32, the best of three. Memory is the peak with packed weights, beyond what
the process used before it loaded the model. Rows are kept in the cache folder ($HUB_MPQ_CACHE).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import hub

NEW = 32
"""Number of tokens to generate."""
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
}
ROWS = ("smollm2 W4 channel", "smollm2 W4 128", "smollm2 W3 128", *(f"{name} W4 32" for name in EXPERTS))

_PULL = """
import ctypes, gc, json, sys, time
import torch, transformers
from hub_mpq import HubMPQ, set_resident

torch.set_num_threads(1)
repo, count, float_model = sys.argv[1], int(sys.argv[2]), sys.argv[3]
ids = torch.load(sys.argv[4], weights_only=True)


def speed(model):
    rates = []
    for _ in range(3):
        seconds = []
        for new in (2, count):
            began = time.process_time()
            out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            seconds.append(time.process_time() - began)
        rates.append((count - 2) / (seconds[1] - seconds[0]))
    return out, max(rates)


def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


HubMPQ.from_pretrained(repo, resident="packed").model.generate(ids, max_new_tokens=1)  # imports what is needed
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # reset the peak
before, began = memory("VmRSS"), time.perf_counter()
mpq = HubMPQ.from_pretrained(repo, resident="packed")
found = {"load_seconds": time.perf_counter() - began}
tokens, found["packed"] = speed(mpq.model)
found["memory"] = memory("VmHWM") - before
set_resident(mpq, "float")
again, found["float resident"] = speed(mpq.model)
plain = transformers.AutoModelForCausalLM.from_pretrained(repo)
auto = plain.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
found["equal"] = torch.equal(tokens, again) and torch.equal(tokens, auto)
found["tokens"] = tokens.tolist()
del plain, mpq
_, found["float"] = speed(transformers.AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.float32))
print(json.dumps(found))
"""


def decoder(name: str, folder: Path) -> tuple[Any, str, list[Any]]:
    """Return (the float model as HubMPQ, its folder, calibration batches)."""
    import torch
    import transformers

    from hub_mpq import HubMPQ

    if name == "smollm2":
        import texts

        return texts.smollm2(), texts.smollm2_path(), texts.chunks("valid", 40)
    cls, config, changes = EXPERTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(transformers, cls)(getattr(transformers, config)(**SIZES, **ENDS, **changes))
        batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 512, (16, 4, 32))]
    net.save_pretrained(folder)
    return HubMPQ.from_pretrained(folder, weight_only=True, fixed={"*": None}), str(folder), batches


def run(row: str) -> dict[str, Any]:
    """Return the figures of one row; SystemExit when the pulled and the pushed model generate different tokens."""
    import torch

    name, level, group = row.split()
    with hub.loopback() as (server, root):
        mpq, float_folder, batches = decoder(name, root / "float")
        mpq.apply_policy(level, batches, group_size=None if group == "channel" else int(group))
        torch.set_num_threads(1)
        ids = batches[0]["input_ids"][:1, :32].cpu()
        torch.save(ids, root / "ids.pt")
        greedy = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        wanted = mpq.model.generate(ids, **greedy)
        up = server.bytes_up()
        mpq.push_to_hub(f"me/{name}", token="token", float_copy=False)
        up, down = server.bytes_up() - up, server.bytes_down()
        done = subprocess.run(
            [sys.executable, "-c", _PULL, f"me/{name}", str(NEW), float_folder, str(root / "ids.pt")],
            env={**os.environ, "HF_HOME": tempfile.mkdtemp(dir=root), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{row}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        if not found.pop("equal") or found.pop("tokens") != wanted.tolist():
            raise SystemExit(f"{row}: the pulled model and the pushed model generate different tokens")
        return {"row": row, "size": mpq.usage()["size"], "up": up, "down": server.bytes_down() - down, **found}


def report() -> None:
    """Print the table of the finished rows in Markdown."""
    head = [
        "model",
        "file, MB",
        "pulled, MB",
        "memory, MB",
        "float",
        "float resident",
        "packed",
        "packed / float",
    ]
    print("tokens per CPU-second of one thread\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in ROWS:
        if not (file := folder() / f"{name.replace(' ', '-')}.json").exists():
            continue
        row = json.loads(file.read_text())
        megabytes = [f"{row[key] / 1e6:.1f}" for key in ("size", "down", "memory")]
        speeds = [f"{row[key]:.1f}" for key in ("float", "float resident", "packed")]
        print("| " + " | ".join([name, *megabytes, *speeds, f"{row['packed'] / row['float']:.2f}"]) + " |")


def folder() -> Path:
    """Return the folder of the rows."""
    from images import cache_root

    found = cache_root() / "generation"
    found.mkdir(parents=True, exist_ok=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help="run this row in this process")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.row:
        found = run(args.row)
        from study import write

        write(folder() / f"{args.row.replace(' ', '-')}.json", found)
        return print(found, flush=True)
    for row in () if args.report else ROWS:
        if not (folder() / f"{row.replace(' ', '-')}.json").exists():
            subprocess.run([sys.executable, __file__, "--row", row], check=True)
    return report()


if __name__ == "__main__":
    main()
