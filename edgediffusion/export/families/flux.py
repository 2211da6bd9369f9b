"""FLUX.1 (Black Forest Labs 2024), dev and schnell: a transformer on packed latents, trained by flow matching.

A token is two by two pixels of the latent; packing, and the places of tokens that rotary embeddings are made of, are nodes of
the graph. CLIP gives one vector for the text, T5 its states. ``dev`` was distilled for guidance and takes its scale as a number;
``schnell`` takes none. The schedule's shift follows from the size of the picture (``DynamicShift``), but for ``schnell``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, block_cuts, positions, text_encoders
from edgediffusion.export.families import BATCH, Axis, Part, Tensor, check_components
from edgediffusion.export.schedule import dynamic_shift, read_scheduler, trailing
from edgediffusion.export.source import Source

PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
OPTIONAL = ("feature_extractor", "image_encoder")
T5_TOKENS, FEW_STEP_T5_TOKENS = 512, 256  # of dev and schnell: Black Forest Labs' own pipeline, and the model card of schnell
PATCH = 2
_SIZE = 128  # FluxPipeline's default, in pixels of the latent
_USED = {"transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}


class Denoiser(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network
        positions.in_float32(network.pos_embed)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """sample [b, c, h, w], timestep [1], encoder_hidden_states [b, tokens, width], pooled_projections [b, width], guidance [b]."""
        batch, channels, height, width = sample.shape
        rows, columns = height // PATCH, width // PATCH
        packed = sample.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        found = self.network(
            hidden_states=packed.reshape(batch, rows * columns, channels * PATCH**2),
            timestep=timestep.expand(batch) / 1000,  # which the network multiplies it by
            guidance=guidance,
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=sample.new_zeros(encoder_hidden_states.shape[1], 3),
            img_ids=_places(rows, columns, sample),
            return_dict=False,
        )[0]
        unpacked = found.reshape(batch, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return unpacked.reshape(batch, channels, height, width)  # type: ignore[no-any-return]


def parts(source: Source) -> tuple[Part, ...]:
    source.require_class("transformer", ("FluxTransformer2DModel",))
    check_components(source, _USED, OPTIONAL)
    clip = replace(text_encoders.clip(source), feeds={"pooler_output": "pooled_projections"})
    t5 = replace(
        text_encoders.t5(source, "_2", t5_tokens(source.settings("transformer"))), feeds={"t5_hidden_states": "encoder_hidden_states"}
    )
    return (clip, t5, _transformer(source), *autoencoder.parts(source))


def t5_tokens(transformer: Mapping[str, Any]) -> int:
    """How many tokens of T5 a transformer of this configuration was trained to read: ``max_sequence_length`` in diffusers."""
    return T5_TOKENS if transformer.get("guidance_embeds") else FEW_STEP_T5_TOKENS


def sampling(source: Source) -> Sampling:
    transformer, latents = source.settings("transformer"), autoencoder.facts(source)
    scheduler = read_scheduler(source, use_dynamic_shifting=False)
    schedule = replace(trailing(scheduler), dynamic_shift=dynamic_shift(source, PATCH * latents.downsampling))
    guided = bool(transformer.get("guidance_embeds"))
    return Sampling(
        prediction=scheduler.prediction,
        guidance="embedded" if guided else "none",
        schedule=schedule,
        latent_channels=latents.channels,
        downsampling=latents.downsampling,
        latent_scale=latents.scale,
        latent_shift=latents.shift,
        height=_SIZE * latents.downsampling,
        width=_SIZE * latents.downsampling,
        size_multiple=PATCH * latents.downsampling,
        fixed_size=False,
        sampler=scheduler.sampler,
        steps=28 if guided else 4,
        guidance_scale=3.5 if guided else 1.0,
    )


def _places(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """[rows * columns, 3]: zero, row and column of every token of the picture."""
    down = torch.arange(rows, dtype=like.dtype)[:, None].expand(rows, columns)
    across = torch.arange(columns, dtype=like.dtype)[None, :].expand(rows, columns)
    return torch.stack([torch.zeros_like(down), down, across], dim=-1).reshape(rows * columns, 3)


def _transformer(source: Source) -> Part:
    config = source.settings("transformer")
    channels = config["in_channels"] // PATCH**2
    rows, columns = Axis("height", 4 * PATCH, PATCH), Axis("width", 6 * PATCH, PATCH)
    guidance = (Tensor("guidance", (BATCH,), "float32"),) if config.get("guidance_embeds") else ()
    return Part(
        name="transformer",
        role="denoise",
        network="transformer",
        wrap=Denoiser,
        inputs=(
            Tensor("sample", (BATCH, channels, rows, columns)),
            Tensor("timestep", (1,), "float32"),
            Tensor("encoder_hidden_states", (BATCH, t5_tokens(config), config["joint_attention_dim"])),
            Tensor("pooled_projections", (BATCH, config["pooled_projection_dim"])),
            *guidance,
        ),
        outputs=(Tensor("out_sample", (BATCH, channels, rows, columns)),),
        cuts=block_cuts.STREAMS,
    )
