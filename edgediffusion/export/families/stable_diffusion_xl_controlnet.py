"""Stable Diffusion XL led by control pictures: its ControlNets take the text's embedding and the sizes as well."""

from __future__ import annotations

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, conditional_unet, control
from edgediffusion.export.families import Part, check_components, stable_diffusion_xl
from edgediffusion.export.families.stable_diffusion_xl import OPTIONAL, USED
from edgediffusion.export.source import Source

PIPELINES = ("StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline")
__all__ = ["OPTIONAL", "PIPELINES", "parts", "sampling"]


def parts(source: Source) -> tuple[Part, ...]:
    check_components(source, {*USED, *control.names(source)}, OPTIONAL)
    texts, tokens, added = stable_diffusion_xl.encoders(source), stable_diffusion_xl.tokens(source), stable_diffusion_xl.added(source)
    controls = control.parts(source, tokens=tokens, added=added)
    unet = conditional_unet.part(source, tokens=tokens, added=added, residuals=control.residuals(source.config("unet")))
    return (*texts, unet, *controls, *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    return stable_diffusion_xl.sampling(source)
