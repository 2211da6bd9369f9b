"""The image side of a pipeline: latents to pixels."""

from __future__ import annotations

import numpy as np

from edgediffusion.bundle import Sampling
from edgediffusion.runtimes.graph import Graph
from edgediffusion.runtimes.images import to_pixels


class Autoencoder:
    """The graph that decodes latents; without one, latents are the pictures. One image at a time: its memory is the pipeline's peak."""

    def __init__(self, sampling: Sampling, decoder: Graph | None):
        self._sampling, self._decoder = sampling, decoder

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [images, c, h, w] to pixels: float32 [images, height, width, channels] in 0..1."""
        latents = latents / self._sampling.latent_scale + self._sampling.latent_shift
        if self._decoder is None:
            return to_pixels(latents)
        return np.concatenate([to_pixels(self._decoded(latents[i : i + 1])) for i in range(len(latents))])

    def _decoded(self, latent: np.ndarray) -> np.ndarray:
        """One latent [1, c, h, w] to the decoder's buffer, [1, channels, height, width] in -1..1."""
        assert self._decoder is not None
        (spec,), (image,) = self._decoder.session.inputs, self._decoder.session.outputs
        height, width = (size * self._sampling.downsampling for size in latent.shape[2:])
        binding = self._decoder.bind({spec.name: latent.shape, image.name: (1, image.shape[1], height, width)})
        binding.inputs[spec.name][...] = latent
        binding.run()
        return binding.outputs[image.name]
