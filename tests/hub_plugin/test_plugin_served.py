"""What a server does with packed folders: load again and again, load and run in several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from plugin_toys import python
from transformers import AutoModelForMaskedLM

from hub_mpq import HubMPQ

THREADS = 8


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm") / "packed"
    mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, num_classes=4, input_size=(3, 32, 32))
    mpq.apply_policy("W4A4").save_pretrained(folder)
    return folder


def at_once(work, items):
    """[work(item)], each in a thread of its own, all at once."""
    with ThreadPoolExecutor(THREADS) as pool, torch.inference_mode():
        return list(pool.map(torch.inference_mode()(work), items))


def images(k):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(k))


def tokens(k):
    return (torch.arange(12)[None] * 7 + k) % 50


def as_they_were():
    """The defaults that loading changes for itself are what they were, for this thread and new ones."""
    layer = torch.nn.Linear(2, 2)
    return torch.get_default_dtype() == torch.float32 and layer.weight.device.type == "cpu" and bool(layer.weight.any())


def test_loads_in_threads_are_equal_to_the_bit(timm_folder, bert):
    for folder, x in ((timm_folder, images(0)), (bert.folder, tokens(0))):

        def load(_, folder=folder, x=x):
            out = HubMPQ.from_pretrained(folder)(x)
            return out if isinstance(out, torch.Tensor) else out.logits

        with torch.inference_mode():
            expected = load(None)
        assert all(torch.equal(found, expected) for found in at_once(load, range(3 * THREADS)))
        assert as_they_were()


THREADS_OF_TRANSFORMERS = """
import sys
from concurrent.futures import ThreadPoolExecutor
import hub_mpq, torch
from transformers import AutoModelForMaskedLM

x = (torch.arange(12)[None] * 7) % 50

@torch.inference_mode()
def load(_):
    return AutoModelForMaskedLM.from_pretrained(sys.argv[1])(x).logits

expected = load(None)
with ThreadPoolExecutor(8) as pool:
    print(sum(torch.equal(found, expected) for found in pool.map(load, range(24))))
layer = torch.nn.Linear(2, 2)
print(torch.get_default_dtype(), layer.weight.device, bool(layer.weight.any()))
"""


def test_loads_by_transformers_in_threads_are_equal_to_the_bit(bert):
    """With tied weights. transformers leaves its classes untied after that: this has a process of its own."""
    assert python(THREADS_OF_TRANSFORMERS, bert.folder).splitlines() == ["24", "torch.float32 cpu True"]


def test_one_model_runs_in_threads_equal_to_the_bit(timm_folder, bert):
    vision, text = HubMPQ.from_pretrained(timm_folder), AutoModelForMaskedLM.from_pretrained(bert.folder)
    for run in (lambda k: vision(images(k)), lambda k: text(tokens(k)).logits):
        with torch.inference_mode():
            expected = [run(k) for k in range(THREADS)]
        items = list(range(THREADS)) * 10
        assert all(torch.equal(found, expected[k]) for k, found in zip(items, at_once(run, items), strict=True))


LOADS = """
import gc, sys
from pathlib import Path
import torch
from hub_mpq import HubMPQ
from transformers import AutoModelForMaskedLM

def rss():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

load = {"hub_mpq": HubMPQ.from_pretrained, "transformers": AutoModelForMaskedLM.from_pretrained}[sys.argv[1]]
for i in range(100):
    model = load(sys.argv[2])
    size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    del model
    if i % 5 == 0:  # what transformers keeps of a model refers to it in a circle
        gc.collect()
    if i == 19:
        before = rss()
print(size, rss() - before)
"""


@pytest.mark.parametrize("by", ["hub_mpq", "transformers"])
def test_100_loads_leave_memory_flat(tmp_path, by):
    """80 loads after the first 20 may take what 4 models do: a twentieth of what they took if each left its weights.

    Most of a model is its embedding, of megabytes: memory of that size goes back to the system when it is freed.
    """
    from plugin_toys import pack

    folder = pack(tmp_path, "bert", vocab_size=40_000).folder
    size, grown = map(int, python(LOADS, by, folder).split())
    assert size > 400_000  # packed: 3 bits of 1.3 million weights
    assert grown < 4 * size
