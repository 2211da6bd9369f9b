"""The image side of a pipeline: latents to pixels, and pixels to the distribution of their latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgediffusion.bundle import Sampling
from edgediffusion.errors import BundleError
from edgediffusion.runtimes.graph import Graph, require_finite
from edgediffusion.runtimes.images import to_pixels
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.tiling import tiled

_LOG_VARIANCE = (-30.0, 20.0)  # between which diffusers' DiagonalGaussianDistribution keeps it


@dataclass(frozen=True)
class Gaussian:
    """Latents that an encoder is not sure about: ``mean`` and ``deviation`` are float32 [pictures, c, h, w], in the loop's scale.

    Without a deviation they are the mean, and nothing is drawn.
    """

    mean: np.ndarray
    deviation: np.ndarray | None = None

    def of(self, which: np.ndarray) -> Gaussian:
        """Those of some pictures, by their numbers."""
        return Gaussian(self.mean[which], None if self.deviation is None else self.deviation[which])

    def draw(self, noise: Noise) -> np.ndarray:
        return self.mean if self.deviation is None else self.mean + self.deviation * noise.normal(self.mean.shape)


class Autoencoder:
    """The graphs between pictures and latents; without a decoder, latents are pictures. The encoder is opened when it is needed.

    One image at a time, and with ``tile`` one tile of so many pixels a side: a decoder's memory is the pipeline's peak.
    """

    def __init__(self, sampling: Sampling, decoder: Graph | None, encoder: Callable[[], Graph] | None = None):
        self._sampling, self._decoder, self._open_encoder = sampling, decoder, encoder
        self._opened: Graph | None = None

    @property
    def channels(self) -> int:
        """Of the pictures that ``encode`` takes. Errors as there."""
        graph = self._encoder()
        channels = self._sampling.latent_channels if graph is None else graph.session.inputs[0].shape[1]
        assert isinstance(channels, int)
        return channels

    def decode(self, latents: np.ndarray, *, tile: int | None = None) -> np.ndarray:
        """Latents [images, c, h, w] to pixels: float32 [images, height, width, channels] in 0..1.

        Raises:
            EngineError: the decoder returned numbers that are not finite.
        """
        factor = self._sampling.downsampling
        latents = latents / self._sampling.latent_scale + self._sampling.latent_shift
        if self._decoder is None:
            return to_pixels(latents)
        run = partial(_run, self._decoder, lambda size: size * factor)
        rows = (latents[i : i + 1] for i in range(len(latents)))
        return np.concatenate([to_pixels(tiled(run, row, tile // factor, tile) if tile else run(row)) for row in rows])

    def encode(self, pixels: np.ndarray, *, tile: int | None = None) -> Gaussian:
        """Pixels [pictures, channels, height, width] in -1..1 to their latents.

        Raises:
            BundleError: the bundle has no graph that encodes. EngineError: the encoder returned numbers that are not finite.
        """
        facts, graph = self._sampling, self._encoder()
        if graph is None:
            return Gaussian((pixels - facts.latent_shift) * facts.latent_scale, np.zeros_like(pixels))
        run = partial(_run, graph, lambda size: size // facts.downsampling)
        rows = (pixels[i : i + 1] for i in range(len(pixels)))
        found = [tiled(run, row, tile, tile // facts.downsampling) if tile else run(row).copy() for row in rows]
        parameters = np.concatenate(found).astype(np.float32)
        if parameters.shape[1] == facts.latent_channels:
            return Gaussian((parameters - facts.latent_shift) * facts.latent_scale)
        mean, log_variance = np.split(parameters, 2, axis=1)
        deviation = np.exp(0.5 * np.clip(log_variance, *_LOG_VARIANCE))
        return Gaussian((mean - facts.latent_shift) * facts.latent_scale, deviation * facts.latent_scale)

    def _encoder(self) -> Graph | None:
        if self._opened is None and self._open_encoder is not None:
            self._opened = self._open_encoder()
        if self._opened is None and self._decoder is not None:
            raise BundleError(
                "This bundle cannot start from a picture: it has no graph that encodes one",
                do="Export the pipeline again with its whole autoencoder.",
            )
        return self._opened


def _run(graph: Graph, size: Callable[[int], int], array: np.ndarray) -> np.ndarray:
    """A graph with one input and one output over [1, c, h, w], to its buffer [1, c', size(h), size(w)]."""
    (fed,), (found,) = graph.session.inputs, graph.session.outputs
    binding = graph.bind({fed.name: array.shape, found.name: (1, found.shape[1], *map(size, array.shape[2:]))})
    binding.inputs[fed.name][...] = array
    binding.run()
    output = binding.outputs[found.name]
    require_finite(output, graph.name)
    return output
