"""Llama 4's experts as calls of their stacks.

In a separate module, because their float type is from transformers, which is slow to import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts


class CallingLlama4Experts(Llama4TextExperts):  # type: ignore[misc]
    """Computes the same as transformers' class, which multiplies all tokens by its Parameters at once. Here too, each
    expert runs on all tokens, where tokens of other experts are zero."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.view(self.num_experts, -1, self.hidden_size)
        count = rows.shape[1]
        tokens = torch.arange(count, device=rows.device)
        gate_up_proj: Any = self.gate_up_proj
        down_proj: Any = self.down_proj
        out = []
        for expert, x in enumerate(rows):
            gate, up = gate_up_proj(x, expert, tokens, count).chunk(2, dim=-1)
            out.append(down_proj(up * self.act_fn(gate), expert, tokens, count))
        return torch.cat(out)
