"""Small packed models. Every layer kind, ragged shapes, plain tensors of several dtypes."""

import math
import random

import torch

from hub_mpq.core import FloatOp, LayerBits, LayerGraph, LayerSpec, Policy
from hub_mpq.cost.size import channel_count, group_count
from hub_mpq.pack import Manifest, PackedTensor, pack_weight

GRAPH = LayerGraph(
    "toy",
    None,
    "timm",
    (3, 8, 8),
    (
        LayerSpec("stem", "conv2d", (5, 3, 3, 3), 8640, 135, 192, True, fixed=LayerBits(8, 8)),
        LayerSpec("depthwise", "conv2d", (7, 1, 3, 3), 4032, 63, 448, False),
        LayerSpec("mlp.fc", "linear", (5, 13), 65, 65, 13, tie="t", activation_tie="a"),
        LayerSpec("attn.c", "conv1d", (6, 11), 66, 66, 6),
        LayerSpec("emb", "embedding", (9, 3), 0, 27, 0),
        LayerSpec("head", "linear", (9, 3), 27, 27, 3, weight_owner="emb"),
    ),
    (FloatOp("attn", "matmul", 10, 0, 'product of "two" activations'),),
    54,
)
WIDTHS = {"stem": "W8A8", "depthwise": "W3A4", "mlp.fc": "W5A2", "attn.c": "W1A8", "emb": "W7A32", "head": "W7A8"}

GRAPH_V2 = LayerGraph(
    "toy",
    None,
    "timm",
    (3, 8, 8),
    (
        *GRAPH.layers[:2],
        LayerSpec("mlp.fc", "linear", (5, 37), 185, 185, 37, fixed=LayerBits(6, 32, 16)),
        LayerSpec("mlp.up", "linear", (3, 16), 48, 48, 16),
        LayerSpec("attn.c", "conv1d", (21, 11), 231, 231, 21),
        LayerSpec("emb", "embedding", (9, 20), 0, 180, 0),
        LayerSpec("head", "linear", (9, 20), 180, 180, 20, weight_owner="emb"),
        LayerSpec("moe.up", "experts", (3, 4, 18), 72, 216, 18),
        LayerSpec("moe.down", "experts_transposed", (3, 18, 4), 72, 216, 18),
    ),
    (),
    54,
)
WIDTHS_V2 = {
    **{"stem": "W8A8", "depthwise": "W3A4", "mlp.fc": "W6g16A32", "mlp.up": "W1g8A32", "attn.c": "W5g8zA32"},
    **{"emb": "W3g8zA32", "head": "W3g8zA32", "moe.up": "W2g8zA32", "moe.down": "W4zA32"},
}


def integers(shape, bits, rng):
    """Integers of a b-bit weight from Python's own generator, whose numbers never change between versions."""
    grid = [-1, 1] if bits == 1 else range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    return torch.tensor([rng.choice(grid) for _ in range(math.prod(shape))]).reshape(shape)


def floats(count, rng):
    return torch.tensor([rng.random() + 0.01 for _ in range(count)])


def toy(widths=WIDTHS, seed=0, graph=GRAPH):
    """(tensors, manifest) of a toy model at these widths."""
    rng = random.Random(seed)
    policy = Policy({name: LayerBits.parse(text) for name, text in widths.items()}, graph.digest)
    tensors = {"bn.weight": floats(7, rng), "bn.steps": torch.tensor(12), "half": floats(3, rng).to(torch.bfloat16)}
    tensors |= {
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(2, 0),
        "fc.bias": floats(5, rng).double(),
    }
    for layer in graph:
        bits = policy.bits[layer.name]
        if layer.weight_owner is None and bits.weight != 32:
            scales = channel_count(layer.kind, layer.weight_shape)
            scale = floats(1 if layer.name == "depthwise" else scales, rng)
            zero = None
            if bits.grouped:
                rows, groups = group_count(layer.kind, layer.weight_shape, bits.group_size)
                scale = floats(rows * groups, rng)
                if bits.group_size is not None:
                    scale = scale.view(rows, groups).to(torch.bfloat16 if bits.weight == 2 else torch.float16)
                if not bits.symmetric:
                    zero = integers(scale.shape, bits.weight, rng)
            tensors[layer.name] = pack_weight(
                integers(layer.weight_shape, bits.weight, rng),
                scale,
                layer.kind,
                bits.weight,
                zero,
                bits.group_size,
            )
        if bits.activation != 32:
            tensors[f"{layer.name}.input_scale"] = floats(1, rng)
    if graph is GRAPH:
        tensors["depthwise.input_zero_point"] = torch.tensor([3], dtype=torch.int32)
        tensors["mlp.fc.weight"] = torch.empty(0)  # what makes a plain load of the file fail aloud
    return tensors, Manifest("toy", "0" * 40, "timm", graph, policy, {"accuracy": 71.25, "text": 'a "b" é\n'})


def same(a, b):
    """Whether two {name: PackedTensor | Tensor} are equal to the bit."""
    flat = [
        {
            f"{name}/{part}": tensor
            for name, value in sorted(side.items())
            for part, tensor in (value.parts() if isinstance(value, PackedTensor) else {"": value}).items()
        }
        for side in (a, b)
    ]
    return flat[0].keys() == flat[1].keys() and all(
        flat[0][k].dtype == flat[1][k].dtype and torch.equal(flat[0][k], flat[1][k]) for k in flat[0]
    )
