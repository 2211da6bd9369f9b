"""Where a loop begins: in noise, in a picture, or where another network stopped."""

from __future__ import annotations

from functools import partial

import numpy as np

from edgediffusion.bundle import Sampling
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.runtimes import handover
from edgediffusion.runtimes.autoencoder import Autoencoder
from edgediffusion.runtimes.graph import Graph
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.painting import Canvas, Start
from edgediffusion.runtimes.parts import channels_of
from edgediffusion.runtimes.request import Plan, Request


def begin(request: Request, plan: Plan, noise: Noise, denoise: Graph, sampling: Sampling, autoencoder: Autoencoder) -> Start:
    """The state of the first step. ``denoise`` says how many channels the network takes beside it.

    Raises:
        ArgumentError: latents or pictures that do not fit, or none for a network that fills in. BundleError: channels that nobody knows,
        or nothing that encodes a picture.
    """
    further = channels_of(denoise, sampling) - sampling.latent_channels
    if further not in (0, sampling.latent_channels + 1):
        raise BundleError(f"The graph '{denoise.name}' takes channels that nobody knows", got=f"{further} beside the latents")
    if further and (plan.painting is None or not plan.painting.masks):
        raise ArgumentError("This network fills in a part of a picture", do="Give image and mask_image.")
    if plan.handed_over:
        return Start(handover.state(request.image, plan.latent_shape))
    first = partial(_first_noise, request, plan, noise)
    if plan.painting is None:
        return Start(plan.points.start(first()))
    canvas = Canvas(
        shape=plan.latent_shape,
        downsampling=sampling.downsampling,
        channels=autoencoder.channels,
        encode=partial(autoencoder.encode, tile=plan.tile),
        noise=noise,
        per_image=not isinstance(request.seed, int),
    )
    return canvas.begin(plan.painting, plan.points, first, beside=further > 0)


def _first_noise(request: Request, plan: Plan, noise: Noise) -> np.ndarray:
    if request.latents is None:
        return noise.normal(plan.latent_shape)
    if request.latents.shape != plan.latent_shape:
        raise ArgumentError("The latents have another shape", got=request.latents.shape, allowed=str(plan.latent_shape))
    return request.latents.astype(np.float32)
