"""What the families of transformers on latents share: the facts of their sampling, and a graph that one encoder's texts enter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, block_cuts
from edgediffusion.export.families import BATCH, Axis, Part, Tensor
from edgediffusion.export.schedule import read_scheduler
from edgediffusion.export.source import Source


def sampling(
    source: Source, *, steps: int, guidance_scale: float, shifted: bool = True, fixed_size: bool = False, classes: int | None = None
) -> Sampling:
    """Of a square picture as large as the network was trained for, guided by a second row; ``shifted`` if the pipeline heeds the
    autoencoder's shift.

    Raises:
        SourceError: the scheduler does something that a bundle cannot state.
    """
    transformer, latents = source.settings("transformer"), autoencoder.facts(source)
    scheduler = read_scheduler(source)
    size = transformer["sample_size"] * latents.downsampling
    return Sampling(
        prediction=scheduler.prediction,
        guidance="classifier-free",
        schedule=scheduler.schedule,
        latent_channels=latents.channels,
        downsampling=latents.downsampling,
        latent_scale=latents.scale,
        latent_shift=latents.shift if shifted else 0.0,
        height=size,
        width=size,
        size_multiple=latents.downsampling * transformer["patch_size"],
        fixed_size=fixed_size,
        sampler=scheduler.sampler,
        steps=steps,
        guidance_scale=guidance_scale,
        classes=classes,
    )


def with_text(source: Source, text: Part, wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> Part:
    """The denoiser [b, c, h, w] of any size, whose conditions are what the encoder ``text`` gives."""
    config = source.settings("transformer")
    patch = config["patch_size"]
    rows, columns = Axis("height", 4 * patch, patch), Axis("width", 6 * patch, patch)
    sample = (BATCH, config["in_channels"], rows, columns)
    return Part(
        name="transformer",
        role="denoise",
        network="transformer",
        wrap=wrap,
        inputs=(
            Tensor("sample", sample),
            Tensor("timestep", (1,), "float32"),
            *(replace(output, name=text.feeds.get(output.name, output.name)) for output in text.outputs),
        ),
        outputs=(Tensor("out_sample", sample),),
        cuts=block_cuts.CROSS_ATTENTION,
    )
