"""The networks, schedules and tokenizers of the reference pipelines."""

from __future__ import annotations

import json

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import data

TOKENS = 16
TEXT_WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"

# A linear ramp of sqrt(beta) as Stable Diffusion has it, but up to an end where almost no signal is left
# (alpha_bar = 4e-5, sigma = 156): on 8x8 latents Stable Diffusion's own end would leak the mean brightness.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.025,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # of no effect with trailing steps; StableDiffusionPipeline warns about any other value
}


def vae(channels: int) -> AutoencoderKL:
    """Down-samples by four into four channels."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32 if channels == 1 else 64,
    )


def unet(sample_size: int, *, time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """Three levels with a skip connection each, cross-attention in the middle one and in the mid block."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        time_cond_proj_dim=time_cond_proj_dim,
    )


def transformer() -> SD3Transformer2DModel:
    """A multimodal diffusion transformer of Stable Diffusion 3's kind, one latent pixel a token."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def text_encoder(tokenizer: CLIPTokenizer, *, width: int = TEXT_WIDTH, projection: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def tokenizer(captions: list[str], vocabulary: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format, learned from the captions."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(c + "</w>" for c in alphabet)]
    # All letters are given as special tokens to number them: the trainer breaks ties by number, and numbers anew in every process.
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=letters, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(captions, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, then the two marks, the end mark last of all.
    words = [*letters, *("".join(m) for m in merges)]
    words = [*dict.fromkeys(words), START, END]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=TOKENS, pad_token=END)


def fashion_tokenizer() -> CLIPTokenizer:
    """Of every caption of ``fashion``; always the same one."""
    captions = [c for label in range(10) for tone in (None, 0, 1, 2) for c in data.fashion_captions(label, tone)]
    return tokenizer(captions, vocabulary=2000)


def diffusion_schedule() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE)


def few_step_schedule() -> LCMScheduler:
    return LCMScheduler(**SCHEDULE)


def flow_schedule() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
