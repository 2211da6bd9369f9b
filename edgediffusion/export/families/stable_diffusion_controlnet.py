"""Stable Diffusion 1.x and 2.x led by control pictures: a UNet that takes the residuals of one or several ControlNets."""

from __future__ import annotations

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, conditional_unet, control, text_encoders
from edgediffusion.export.families import Part, check_components
from edgediffusion.export.families.stable_diffusion import OPTIONAL, USED, facts
from edgediffusion.export.schedule import read_scheduler
from edgediffusion.export.source import Source

PIPELINES = ("StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline")
__all__ = ["OPTIONAL", "PIPELINES", "parts", "sampling"]


def parts(source: Source) -> tuple[Part, ...]:
    check_components(source, {*USED, *control.names(source)}, OPTIONAL)
    text, tokens = text_encoders.clip(source), text_encoders.clip_tokens(source, "text_encoder")
    controls = control.parts(source, tokens=tokens)
    unet = conditional_unet.part(source, tokens=tokens, residuals=control.residuals(source.config("unet")))
    return (text, unet, *controls, *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    return facts(source, read_scheduler(source))
