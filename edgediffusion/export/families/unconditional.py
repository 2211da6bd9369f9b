"""Diffusion of pixels from nothing, or from a class (Ho et al. 2020, 2006.11239): a UNet and no autoencoder."""

from __future__ import annotations

from edgediffusion.bundle import Sampling
from edgediffusion.export import plain_unet
from edgediffusion.export.families import Part, check_components
from edgediffusion.export.source import Source

_STEPS = {"DDPMPipeline": 1000, "DDIMPipeline": 50}  # what diffusers' pipelines draw with
PIPELINES = tuple(_STEPS)
OPTIONAL = ()


def parts(source: Source) -> tuple[Part, ...]:
    check_components(source, {"unet", "scheduler"}, OPTIONAL)
    return (plain_unet.part(source),)


def sampling(source: Source) -> Sampling:
    return plain_unet.facts(source, steps=_STEPS[source.class_name])
