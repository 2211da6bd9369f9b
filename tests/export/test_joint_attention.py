"""One token of the text in place of many that are the same: equal to diffusers' own attention over all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from edgediffusion.export.families import stable_diffusion_3
from edgediffusion.export.joint_attention import RepeatedLast, repeat_last
from edgediffusion.export.source import Source


@pytest.mark.parametrize("norm", ["rms_norm", None])
@pytest.mark.parametrize("dual", [(), (0,)])
def test_the_prediction_is_that_of_all_tokens(norm: str | None, dual: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        qk_norm=norm,
        dual_attention_layers=dual,
    ).eval()
    text, pooled, sample = torch.randn(2, 5, 12), torch.randn(2, 10), torch.randn(2, 4, 8, 8)
    zeros = torch.zeros(2, 300, 12)

    def predict(zeros: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([text, zeros], 1)
        return network(sample, joined, pooled, torch.tensor([500.0, 500.0]), return_dict=False)[0]  # type: ignore[no-any-return]

    with torch.no_grad():
        expected, one = predict(zeros), predict(zeros[:, :1])
        repeat_last(network, 300)
        found = predict(zeros[:, :1])
    assert (one - expected).abs().max() > 1e-3 * expected.abs().max()  # else how often the token counts would make no difference
    # Float32's own roundings of three blocks: the same sums, perhaps in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_stable_diffusion_3_without_t5_has_one_token_for_its_zeros(flow: Path, flow_t5: Path) -> None:
    for source, repeats in ((Source.open(flow), True), (Source.open(flow_t5), False)):
        (part,) = (part for part in stable_diffusion_3.parts(source) if part.role == "denoise")
        network = source.load("transformer")
        part.wrap(network)
        assert [isinstance(block.attn.processor, RepeatedLast) for block in network.transformer_blocks] == [repeats] * 2
