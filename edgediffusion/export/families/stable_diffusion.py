"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, 2112.10752), and latent consistency models made from it.

A UNet on latents with cross-attention to one CLIP text encoder. A UNet that was distilled for guidance embeds its
scale through the input ``timestep_cond``; others are guided by a second, unconditional row. One that was trained to
fill in a part of a picture has further channels for the mask and for what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, conditional_unet, text_encoders
from edgediffusion.export.families import Part, check_components
from edgediffusion.export.schedule import Scheduler, read_scheduler
from edgediffusion.export.source import Source

# Settings of their schedulers that these classes overrule.
_OVERRULED: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
    "LatentConsistencyModelPipeline": {},
}
PIPELINES = tuple(_OVERRULED)
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
USED = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


def parts(source: Source) -> tuple[Part, ...]:
    check_components(source, USED, OPTIONAL)
    text = text_encoders.clip(source)
    unet = conditional_unet.part(source, tokens=text_encoders.clip_tokens(source, "text_encoder"))
    return (text, unet, *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    return facts(source, read_scheduler(source, **_OVERRULED[source.class_name]))


def facts(source: Source, scheduler: Scheduler) -> Sampling:
    """What a loop must know of a UNet with cross-attention and its autoencoder."""
    unet, latents = source.config("unet"), autoencoder.facts(source)
    guidance_width, usual = unet.get("time_cond_proj_dim") or 0, conditional_unet.usual(scheduler)
    height, width = conditional_unet.latent_size(unet)
    return Sampling(
        prediction=scheduler.prediction,
        guidance="embedded" if guidance_width else "classifier-free",
        schedule=scheduler.schedule,
        latent_channels=latents.channels,
        downsampling=latents.downsampling,
        latent_scale=latents.scale,
        latent_shift=latents.shift,
        height=height * latents.downsampling,
        width=width * latents.downsampling,
        size_multiple=latents.downsampling * conditional_unet.coarsest(unet),
        fixed_size=False,
        sampler=scheduler.sampler,
        steps=usual.steps,
        guidance_scale=usual.guidance_scale,
        guidance_width=guidance_width,
    )
