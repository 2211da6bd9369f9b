"""Joint attention over a text whose last tokens are all the same, as the zeros are that stand in for Stable Diffusion 3's T5.

Nothing in a network tells such tokens apart: they have no positions, so that they stay the same in every block. One of them goes
through the blocks for all, and attention reads its key and value as often as there are tokens. Predictions are those of all tokens,
to rounding.
"""

from __future__ import annotations

from typing import Any

import torch


class RepeatedLast:
    """A processor for the joint attention of Stable Diffusion 3's blocks: the text's last token counts ``times`` times."""

    def __init__(self, times: int):
        self.times = times

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [b, positions, width], encoder_hidden_states [b, tokens, width]; as much of either is returned."""

        def heads(x: torch.Tensor, norm: Any = None) -> torch.Tensor:
            x = x.reshape(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)
            return x if norm is None else norm(x)

        x, text = hidden_states, encoder_hidden_states
        q = torch.cat([heads(attn.to_q(x), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], dim=2)
        text_k, text_v = heads(attn.add_k_proj(text), attn.norm_added_k), heads(attn.add_v_proj(text))
        k = torch.cat([heads(attn.to_k(x), attn.norm_k), text_k, self._others(text_k)], dim=2)
        v = torch.cat([heads(attn.to_v(x)), text_v, self._others(text_v)], dim=2)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        of_x, of_text = found[:, : x.shape[1]], found[:, x.shape[1] :]
        return attn.to_out[0](of_x), of_text if attn.context_pre_only else attn.to_add_out(of_text)

    def _others(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, -1:].expand(-1, -1, self.times - 1, -1)


def repeat_last(network: torch.nn.Module, times: int) -> None:
    """Let all blocks of a network count the text's last token so, in place."""
    for block in network.transformer_blocks:  # type: ignore[union-attr]
        block.attn.set_processor(RepeatedLast(times))
