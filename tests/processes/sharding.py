"""Indicators of a model whose parameters are in parts, beside DDP's."""

from __future__ import annotations

import signal

import torch
from process_toys import X, _net, loader, rounded

from hub_mpq import HubMPQ
from hub_mpq.core import Engine
from hub_mpq.search.limpq import LIMPQ


def unsharded():
    """fully_shard that does nothing, as a plug-in did that gave DDP without a word."""
    plain, torch.distributed.fsdp.fully_shard = torch.distributed.fsdp.fully_shard, lambda *args, **options: None
    try:
        HubMPQ.from_module(_net(), X).train_indicators(loader(), steps=1, engine=Engine(fsdp=True))
    finally:
        torch.distributed.fsdp.fully_shard = plain


def decoder():
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, max_position_embeddings=16, **sizes)
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else None  # a loss that depends on the input
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 32, (4, 8), generator=generator) for _ in range(8)]
    return net.eval(), [{"input_ids": ids, "labels": ids} for ids in rows]


class Sharding(LIMPQ):
    """Notes what was sharded, and the gradients of scales."""

    def before_step(self, model, step):
        from torch.distributed.tensor import DTensor

        self.sharded = sum(isinstance(p, DTensor) for p in model.parameters())
        self.whole = {n for n, p in model.named_parameters() if not isinstance(p, DTensor)}
        self.shifts = {n: p.grad.flatten().tolist() for n, p in model.named_parameters() if "shift" in n}
        self.part = sum(p.to_local().numel() if isinstance(p, DTensor) else 0 for p in model.parameters())


def fsdp(folder):
    """Indicators of a decoder: by DDP, sharded, and sharded with an interruption."""
    from hub_mpq.search.strategy import strategies

    made = []

    class Kept(Sharding):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

        def after_step(self, model, step):
            if stops and step == 3:
                signal.raise_signal(signal.SIGINT)

    stops, out = False, {}
    plain = strategies.get("limpq")
    strategies.unregister("limpq")
    strategies.register("limpq", Kept)
    net, rows = decoder()
    try:
        for name, engine in (("ddp", Engine()), ("fsdp", Engine(fsdp=True))):
            mpq = HubMPQ.from_module(net, {"input_ids": rows[0]["input_ids"][:1]})
            found = mpq.train_indicators(rows, steps=6, candidates=[2, 4], seed=1, engine=engine)
            out[name] = {
                "weight": rounded(found.weight),
                "activation": rounded(found.activation),
                "loss": found.provenance["epoch_loss"],
                "sharded": made[-1].sharded,
                "whole": sorted(made[-1].whole),
                "shifts": made[-1].shifts,
                "part": made[-1].part,
            }
        states = {"checkpoint_dir": folder / "fsdp", "steps": 6, "candidates": [2, 4], "seed": 1, "engine": engine}
        stops = True
        try:
            HubMPQ.from_module(net, {"input_ids": rows[0]["input_ids"][:1]}).train_indicators(rows, **states)
        except KeyboardInterrupt as error:
            out["said"] = str(error).partition(";")[0]
        stops = False
        mpq = HubMPQ.from_module(net, {"input_ids": rows[0]["input_ids"][:1]})
        found = mpq.train_indicators(rows, **states, resume=True)
        out["resumed"] = {"weight": rounded(found.weight), "activation": rounded(found.activation)}
    finally:
        strategies.unregister("limpq")
        strategies.register("limpq", plain)
    out["parameters"] = sum(p.numel() for p in net.parameters())
    return out
