"""Tiny random pipelines of the transformer families: the classes of the real ones, as little as has every part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextModel, Gemma2Config, Gemma2Model, GemmaTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tests.export.conftest import CAPTIONS, clip_config, saved, small_vae
from training import networks

Builder = Callable[[], Any]


def t5(width: int = 24) -> tuple[T5EncoderModel, T5Tokenizer]:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz")]
    config = T5Config(vocab_size=32, d_model=width, d_kv=12, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config), T5Tokenizer(vocab=vocabulary, extra_ids=0)


def flux(*, guidance_embeds: bool, kind: type = diffusers.FluxPipeline, vae: Any = None) -> Any:
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
    return kind(
        scheduler=scheduler,
        vae=vae or small_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 12)),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=other,
        transformer=transformer,
    )


def flux_from_pictures() -> diffusers.FluxImg2ImgPipeline:
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    return flux(guidance_embeds=True, kind=diffusers.FluxImg2ImgPipeline, vae=vae)


def dit() -> diffusers.DiTPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=1000
    )
    return diffusers.DiTPipeline(transformer, small_vae(), diffusers.DDIMScheduler(clip_sample=False), {"0": "tench, Tinca tinca"})


def pixart(*, sigma: bool) -> diffusers.DiffusionPipeline:
    """The larger of alpha's two networks reads the size of the picture: that of 128 x 128 latents."""
    encoder, tokenizer = t5()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8 if sigma else 128,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=24,
        interpolation_scale=1 if sigma else 2,
        use_additional_conditions=False if sigma else None,
    )
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    return kind(tokenizer, encoder, small_vae(scaling_factor=0.13025 if sigma else 0.18215), transformer, scheduler)


def gemma() -> tuple[Gemma2Model, GemmaTokenizer]:
    letters = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "\n",
        *"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;-'\"()0123456789",
    ]
    config = Gemma2Config(
        vocab_size=len(letters),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=64,
    )
    return Gemma2Model(config), GemmaTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])


def sana() -> diffusers.SanaPipeline:
    encoder, tokenizer = gemma()
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=32,
        timestep_scale=1.0,
    )
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return diffusers.SanaPipeline(tokenizer, encoder, autoencoder, transformer, scheduler)


BUILDERS: dict[str, Builder] = {
    "flux-dev": lambda: flux(guidance_embeds=True),
    "flux-schnell": lambda: flux(guidance_embeds=False),
    "flux-tiny-autoencoder": flux_from_pictures,
    "dit": dit,
    "pixart-alpha": lambda: pixart(sigma=False),
    "pixart-sigma": lambda: pixart(sigma=True),
    "sana": sana,
}


def write(name: str, folder: Path) -> Path:
    torch.manual_seed(7)
    return saved(BUILDERS[name](), folder)
