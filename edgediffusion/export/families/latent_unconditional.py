"""Latent diffusion from nothing, or from a class (Rombach et al. 2022, 2112.10752, section 4.1): a UNet on latents of a VQModel."""

from __future__ import annotations

from edgediffusion.bundle import Sampling
from edgediffusion.export import plain_unet, vq_autoencoder
from edgediffusion.export.families import Part, check_components
from edgediffusion.export.source import Source

PIPELINES = ("LDMPipeline",)
OPTIONAL = ()
_STEPS = 50  # what diffusers' pipeline draws with
_SCALE = 0.18215  # VQModel's own where its configuration says nothing


def parts(source: Source) -> tuple[Part, ...]:
    check_components(source, {"unet", "vqvae", "scheduler"}, OPTIONAL)
    return (plain_unet.part(source), *vq_autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    scale = source.config(vq_autoencoder.NAME).get("scaling_factor", _SCALE)
    return plain_unet.facts(source, downsampling=vq_autoencoder.downsampling(source), latent_scale=scale, steps=_STEPS)
