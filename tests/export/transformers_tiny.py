"""Tiny random pipelines of the transformer families: the classes of the real ones, as little as has every part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from tests.export.conftest import CAPTIONS, clip_config, saved, small_vae
from training import networks

Builder = Callable[[], Any]


def t5(width: int = 24) -> tuple[T5EncoderModel, T5Tokenizer]:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz")]
    config = T5Config(vocab_size=32, d_model=width, d_kv=12, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config), T5Tokenizer(vocab=vocabulary, extra_ids=0)


def flux(*, guidance_embeds: bool) -> diffusers.FluxPipeline:
    tokenizer = networks.tokenizer(CAPTIONS, 600)
    tokenizer.model_max_length = 16  # as many as its encoder has places for
    encoder, other = t5()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds)
    return diffusers.FluxPipeline(
        scheduler=scheduler,
        vae=small_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 12)),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=other,
        transformer=transformer,
    )


BUILDERS: dict[str, Builder] = {
    "flux-dev": lambda: flux(guidance_embeds=True),
    "flux-schnell": lambda: flux(guidance_embeds=False),
}


def write(name: str, folder: Path) -> Path:
    torch.manual_seed(7)
    return saved(BUILDERS[name](), folder)
