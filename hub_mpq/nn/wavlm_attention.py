"""WavLM's attention as calls of its layers, in a separate module because its float type is from transformers, which is
slow to import."""

from __future__ import annotations

from torch import Tensor
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from .multihead_attention import attend


class CallingWavLMAttention(WavLMAttention):  # type: ignore[misc]
    """Computes the same as transformers' class, which passes the weights of its four layers to one torch function."""

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        out, weights = attend(
            query,
            key,
            value,
            self.num_heads,
            mask=gated_position_bias,
            padding=None if attention_mask is None else attention_mask.ne(1),
            dropout=self.dropout if self.training else 0.0,
        )
        # the mean over the heads, for each head: what transformers returns
        return self.out_proj(out), weights[:, None].expand(-1, self.num_heads, -1, -1)
