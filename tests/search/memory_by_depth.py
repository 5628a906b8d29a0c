"""Prints the peak memory, beyond the model's own, of rounding and of scoring random decoders of several depths."""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hub_mpq import HubMPQ
from hub_mpq.nn.calibrate import widths_off
from hub_mpq.nn.input_moments import input_moments
from hub_mpq.nn.quantize import quantize_with_lsq
from hub_mpq.quantizers.gptq import Factor
from hub_mpq.quantizers.weight_grid import WeightGrid, weight_grid
from hub_mpq.search.sensitivity import sensitivity
from hub_mpq.tasks import task_of


def resident(which):
    """Bytes of memory that this process holds (VmRSS), or held at most since the last `reset` (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(which))


def peak(work):
    """Bytes that a piece of work takes at most, beyond what there is before it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def measured(depth):
    """{work: peak in bytes} of a decoder in bfloat16."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    net = LlamaForCausalLM(config).bfloat16().eval()
    batches = [{"input_ids": ids} for ids in torch.randint(1000, (1, 4, 128))]
    mpq = HubMPQ.from_module(net, {"input_ids": batches[0]["input_ids"][:1, :8]}, exclude=["model.embed_tokens"])
    model, graph = mpq.model, mpq.graph
    task = task_of(None, model)

    def rounded():
        for part in input_moments(model, graph, batches, task.forward):
            for layer in part.layers:
                h, weight = part.moments[layer.name], model.get_submodule(layer.name).weight
                Factor(h).round(weight, [WeightGrid(3, *weight_grid(weight, 3, importance=h.diagonal()))])

    def scored():
        with widths_off(model):
            sensitivity(layers, model, batches, task)

    found = {"rounding": peak(rounded)}
    layers = quantize_with_lsq(model, graph, {layer.name: ((3,), ()) for layer in graph}, per_channel=True)
    return found | {"scores": peak(scored)}


if __name__ == "__main__":
    torch.manual_seed(0)
    measured(2)
    print(json.dumps([measured(int(depth)) for depth in sys.argv[1:]]))
