"""Perplexity of policies in llama.cpp, beside llama.cpp's own mixtures of equal size.

    python examples/benchmarks/gguf_perplexity.py --llama-python /path/to/python

SmolLM2-135M on 16 chunks of 256 tokens of WikiText-2's test split, all in llama.cpp. Q4_K_M and Q3_K_M are made by its
llama_model_quantize from the F16 file that hub_mpq writes. For the bytes of each of them a policy is chosen among
Q4_0, Q5_0 and Q8_0 ("exact": our GPTQ weights are written unchanged) and among all types ("all": llama.cpp makes
K-quants from our weights). Calibrated on 40 chunks of the validation split. The embedding, which is also the head, is
Q8_0 in all of them. --llama-python names the interpreter of an environment with llama-cpp-python, which takes about
half an hour to build.

Note: the float weights come from a file of Q4_1 tensors, the only one in the package registry. Types with a minimum for
each 32 weights (Q4_1, Q4_K) find them on their grid.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import study
import texts
import torch
from images import cache_root

from hub_mpq import HubMPQ
from hub_mpq.export.gguf import FILE, TENSOR_TYPES
from hub_mpq.export.gguf_write import write_gguf

MIXTURES = {"Q4_K_M": 15, "Q3_K_M": 12}
"""{name: number of the file type in llama.cpp}."""
Q8_0 = 7
QUANTIZE = """
import ctypes, json, sys
import llama_cpp
source, out, kind, types = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
numbers = {"f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
numbers |= {"q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14}
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype = 1, kind
if types:
    rows = [line.rpartition("=") for line in open(types[0]).read().split()]
    table = (llama_cpp.llama_model_tensor_override * (len(rows) + 1))()
    for cell, (pattern, _, name) in zip(table, rows):
        cell.pattern, cell.type = pattern.encode(), numbers[name]
    params.tt_overrides = table
assert llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)) == 0
"""
MEASURE = """
import json, sys
import llama_cpp
import numpy as np
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False)
losses = []
for row in json.load(sys.stdin):
    model.reset()
    model.eval(row)
    logits = np.array(model.scores[: len(row) - 1], dtype=np.float64)
    logits -= logits.max(1, keepdims=True)
    losses += (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(row) - 1), row[1:]]).tolist()
print(json.dumps(losses))
"""


def folder() -> Path:
    """Return the folder of the files and the rows."""
    found = cache_root() / "gguf"
    found.mkdir(parents=True, exist_ok=True)
    return found


def llama(python: str, script: str, *args: object, stdin: str = "") -> str:
    """Run a script with llama-cpp-python and return what it prints."""
    return subprocess.run(
        [python, "-c", script, *map(str, args)], input=stdin, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def perplexity(python: str, file: Path) -> dict[str, object]:
    """Return the bytes of a file and its losses in llama.cpp."""
    ids = torch.cat([batch["input_ids"] for batch in texts.chunks("test", 16)]).tolist()
    losses = json.loads(llama(python, MEASURE, file, stdin=json.dumps(ids)))
    return {"row": file.stem, "bytes": file.stat().st_size, "losses": losses}


def mixed(python: str, file: Path, size: int, *, exact: bool) -> Path:
    """Write the file of the policy that measures best within a number of bytes, and check its size."""
    mpq = HubMPQ.from_pretrained(texts.smollm2_path(), target="gguf", sequence_length=256)
    mpq.quantize(
        size=size,
        group_size=32 if exact else None,
        candidates=[4, 5, 8] if exact else None,
        train=texts.chunks("valid", 40),
        validate=texts.chunks("valid", 16, first=40),
        validate_seconds=600,
        epochs=0,
        checkpoint_dir=folder() / ("exact" if exact else "all"),
        resume=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # K-quants are made later
        mpq.export(file.with_suffix(""), "gguf")
    llama(python, QUANTIZE, file.with_suffix("") / FILE, file, Q8_0, file.with_suffix("") / TENSOR_TYPES)
    assert file.stat().st_size == mpq.usage()["GGUF file"] <= size
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama-python", default=sys.executable, help="Python interpreter that has llama-cpp-python")
    args = parser.parse_args()
    python, where = args.llama_python, folder()

    def row(file: Path, theirs: Path | None = None) -> None:
        kept = where / f"{file.stem}.json"
        if not kept.exists():
            study.write(kept, perplexity(python, file))
        found = json.loads(kept.read_text())
        losses = torch.tensor(found["losses"], dtype=torch.float64)
        less = ""
        if theirs is not None:
            other = torch.tensor(json.loads((where / f"{theirs.stem}.json").read_text())["losses"])
            chunks = (losses - other).view(16, -1).mean(1)
            less = f"{chunks.mean():+.4f} ± {chunks.std() / 4:.4f}"
        print(f"| {found['row']} | {found['bytes']:,} | {losses.mean().exp():.2f} | {less} |", flush=True)

    print("| file | bytes | perplexity | loss minus that of llama.cpp's mixture, ± one standard error over chunks |")
    print("|---|---|---|---|")
    source = where / "F16.gguf"
    if not source.exists():
        mpq = HubMPQ.from_pretrained(texts.smollm2_path(), target="gguf", sequence_length=256)
        write_gguf(source, mpq.model, mpq.graph)
    row(source)
    for name, kind in MIXTURES.items():
        theirs = where / f"{name}.gguf"
        if not theirs.exists():
            llama(python, QUANTIZE, source, theirs, kind)
        row(theirs)
        for exact in (True, False):
            ours = where / f"{'exact' if exact else 'all'}-as-{name}.gguf"
            row(ours if ours.exists() else mixed(python, ours, theirs.stat().st_size, exact=exact), theirs)


if __name__ == "__main__":
    main()
