"""Cross-attention with a mask, as engines take it.

diffusers repeats the mask of a text for every head. ONNX Runtime's Attention takes one for all heads, but with a row for every
query; so that is what is made of it here: [b, 1, queries, tokens], a few megabytes, and not as many times more as there are heads.
"""

from __future__ import annotations

from typing import Any

import torch


class MaskedAttention:
    """A processor for the cross-attention of PixArt's and Sana's blocks."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask: torch.Tensor, **unused: Any
    ) -> torch.Tensor:
        """hidden_states [b, queries, width], encoder_hidden_states [b, tokens, width], attention_mask [b, 1, tokens]: added to scores."""
        batch, queries, tokens = hidden_states.shape[0], hidden_states.shape[1], encoder_hidden_states.shape[1]
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k = (x if norm is None else norm(x) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        q, k, v = (x.reshape(batch, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2) for x in (q, k, v))
        mask = attention_mask[:, None].expand(batch, 1, queries, tokens)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attn.to_out[0](found.transpose(1, 2).reshape(batch, queries, -1))  # type: ignore[no-any-return]


def with_masks(network: torch.nn.Module) -> None:
    """Let all blocks of a network attend to its text so, in place."""
    for block in network.transformer_blocks:  # type: ignore[union-attr]
        block.attn2.set_processor(MaskedAttention())
