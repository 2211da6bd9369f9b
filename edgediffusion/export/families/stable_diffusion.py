"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, 2112.10752), and latent consistency models made from it.

A UNet on latents with cross-attention to one CLIP text encoder. A UNet that was distilled for guidance embeds its
scale through the input ``timestep_cond``; others are guided by a second, unconditional row.
"""

from __future__ import annotations

from typing import Any

import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, skip_cuts, text_encoders
from edgediffusion.export.families import BATCH, Axis, Part, Tensor, check_components
from edgediffusion.export.schedule import read_scheduler
from edgediffusion.export.source import Source

PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_USED = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


class Denoiser(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """sample [b, c, h, w], timestep [1], encoder_hidden_states [b, tokens, width], timestep_cond [b, width]."""
        found = self.network(sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False)
        return found[0]  # type: ignore[no-any-return]


def parts(source: Source) -> tuple[Part, ...]:
    source.require_class("unet", ("UNet2DConditionModel",))
    check_components(source, _USED, OPTIONAL)
    text = text_encoders.clip(source)
    return (text, _unet(source, tokens=text_encoders.clip_tokens(source, "text_encoder")), *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    unet, vae = source.config("unet"), source.config(autoencoder.NAME)
    # StableDiffusionPipeline overrules these two settings of its scheduler; the latent consistency one does not.
    plain = source.class_name == "StableDiffusionPipeline"
    scheduler = read_scheduler(source, **({"steps_offset": 1, "clip_sample": False} if plain else {}))
    factor = autoencoder.downsampling(vae)
    guidance_width = unet.get("time_cond_proj_dim") or 0
    height, width = _size(unet)
    return Sampling(
        prediction=scheduler.prediction,
        guidance="embedded" if guidance_width else "classifier-free",
        schedule=scheduler.schedule,
        latent_channels=vae["latent_channels"],
        downsampling=factor,
        latent_scale=vae.get("scaling_factor", 0.18215),
        latent_shift=vae.get("shift_factor") or 0.0,
        height=height * factor,
        width=width * factor,
        size_multiple=factor * _coarsest(unet),
        fixed_size=False,
        sampler=scheduler.sampler,
        steps=4 if scheduler.sampler == "lcm" else 20,
        guidance_scale=5.0,
        guidance_width=guidance_width,
    )


def _unet(source: Source, tokens: int) -> Part:
    config = source.config("unet")
    multiple = _coarsest(config)
    rows, columns = Axis("height", 2 * multiple, multiple), Axis("width", 3 * multiple, multiple)
    conditions = [Tensor("encoder_hidden_states", (BATCH, tokens, config["cross_attention_dim"]))]
    if config.get("time_cond_proj_dim"):
        conditions.append(Tensor("timestep_cond", (BATCH, config["time_cond_proj_dim"])))
    return Part(
        name="unet",
        role="denoise",
        network="unet",
        wrap=Denoiser,
        inputs=(Tensor("sample", (BATCH, config["in_channels"], rows, columns)), Tensor("timestep", (1,), "float32"), *conditions),
        outputs=(Tensor("out_sample", (BATCH, config["out_channels"], rows, columns)),),
        cuts=skip_cuts,
    )


def _coarsest(config: dict[str, Any]) -> int:
    """Pixels of the latent that become one at the UNet's lowest level."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _size(config: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a latent of the size that the UNet was trained for."""
    size = config["sample_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])
