"""The graph of a UNet2DModel, which draws from nothing or from a class: of pixels, or of an autoencoder's latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from edgediffusion.bundle import Sampling
from edgediffusion.errors import SourceError
from edgediffusion.export import skip_cuts
from edgediffusion.export.conditional_unet import axes, coarsest, latent_size
from edgediffusion.export.families import BATCH, Part, Tensor
from edgediffusion.export.named import Named
from edgediffusion.export.schedule import read_scheduler
from edgediffusion.export.source import Source

NAME, CLASSES = "unet", ("UNet2DModel",)
LABELS = "class_labels"


def part(source: Source) -> Part:
    """The ``denoise`` graph: sample [b, c, h, w], timestep [1], and class_labels [b] where the network knows classes.

    Raises:
        SourceError: it is of another class, predicts more than noise, or takes classes as something else than numbers.
    """
    source.require_class(NAME, CLASSES)
    config = source.config(NAME)
    if config["out_channels"] != config["in_channels"] or config.get("class_embed_type") is not None:
        raise SourceError(
            f"The UNet of this {source.class_name} predicts or takes something that is not known",
            got=f"{config['in_channels']} channels in, {config['out_channels']} out, class_embed_type {config.get('class_embed_type')}",
            allowed="as many channels out as in, and class_embed_type null",
            do="Use a network without a predicted variance, whose classes are numbers.",
        )
    sample = Tensor("sample", (BATCH, config["in_channels"], *axes(config)))
    labels = (Tensor(LABELS, (BATCH,), "int64"),) if config.get("num_class_embeds") else ()
    inputs = (sample, Tensor("timestep", (1,), "float32"), *labels)
    return Part(
        name=NAME,
        role="denoise",
        network=NAME,
        wrap=partial(Named, names=[tensor.name for tensor in inputs], call=_call),
        inputs=inputs,
        outputs=(Tensor("out_sample", sample.axes),),
        cuts=skip_cuts,
    )


def facts(source: Source, *, downsampling: int = 1, latent_scale: float = 1.0, steps: int) -> Sampling:
    """What a loop must know of it; without an autoencoder, latents are the pixels."""
    config, scheduler = source.config(NAME), read_scheduler(source, may_clip=True)
    height, width = latent_size(config)
    return Sampling(
        prediction=scheduler.prediction,
        guidance="none",
        schedule=scheduler.schedule,
        latent_channels=config["in_channels"],
        downsampling=downsampling,
        latent_scale=latent_scale,
        latent_shift=0.0,
        height=height * downsampling,
        width=width * downsampling,
        size_multiple=downsampling * coarsest(config),
        fixed_size=False,
        sampler=scheduler.sampler,
        steps=steps,
        guidance_scale=1.0,
        classes=config.get("num_class_embeds") or None,
        clip=scheduler.clip,
    )


def _call(network: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    found = network(given["sample"], given["timestep"], class_labels=given.get(LABELS), return_dict=False)
    return found[0]  # type: ignore[no-any-return]
