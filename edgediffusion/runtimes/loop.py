"""The loop: a generator of steps around a sampler, and what a generation leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgediffusion.runtimes.corrections import Corrector
from edgediffusion.runtimes.graph import require_finite
from edgediffusion.runtimes.images import to_images
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.painting import Keep
from edgediffusion.runtimes.samplers import Denoise, Sampler
from edgediffusion.runtimes.schedules import CLEAN, Points


@dataclass(frozen=True)
class Step:
    """The state after one step. ``latents`` and the estimate of x_0, ``denoised``, are float32 [images, c, h, w]."""

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    denoised: np.ndarray
    elapsed_ms: float
    _pixels: Callable[[np.ndarray], np.ndarray] = field(repr=False)

    def preview(self) -> list[Any]:
        """Pillow images of what the network now takes the pictures to be; costs a run of the decoder."""
        return to_images(self._pixels(self.denoised))


@dataclass(frozen=True)
class Timings:
    """Wall-clock times of one generation."""

    encode_ms: float
    step_ms: tuple[float, ...]
    decode_ms: float

    @property
    def total_ms(self) -> float:
        return self.encode_ms + sum(self.step_ms) + self.decode_ms


@dataclass(frozen=True)
class Result:
    """``pixels`` is float32 [images, height, width, channels] in 0..1; ``latents`` is what they were decoded from."""

    pixels: np.ndarray
    latents: np.ndarray
    seeds: tuple[int, ...]
    timings: Timings
    warnings: tuple[str, ...]

    @property
    def images(self) -> list[Any]:
        """The pictures as Pillow images."""
        return to_images(self.pixels)


@dataclass(frozen=True)
class Loop:
    """One walk along ``points`` from a state x, float32 [images, ...]; iterating it again starts it again.

    ``pixels`` decodes what a step is asked to show. ``corrector`` may change a state before it is seen, ``keep`` what of a picture
    is put back then. ``graph`` names the graph that is asked at a time step.
    """

    sampler: Sampler
    points: Points
    denoise: Denoise
    x: np.ndarray
    noise: Noise
    corrector: Corrector
    pixels: Callable[[np.ndarray], np.ndarray]
    graph: Callable[[float], str]
    keep: Keep | None = None

    def __iter__(self) -> Iterator[Step]:
        """Raises EngineError when the network returns numbers that are not finite."""
        total = len(self.points)
        x0: np.ndarray | None = None

        def denoise(x: np.ndarray, i: int) -> np.ndarray:
            nonlocal x0
            x0 = self.denoise(x, i)
            if not np.isfinite(x0).all():
                timestep = self.points.at[i].timestep
                require_finite(x0, self.graph(timestep), f" in step {i + 1} of {total}, at time step {timestep:g}")
            return x0

        started = time.perf_counter()
        for i, latents in enumerate(self.sampler.sample(denoise, self.x, self.points, self.noise)):
            assert x0 is not None  # a step calls the network
            if i + 1 < total:
                self.corrector.state(latents, i + 1)
            if self.keep is not None:
                self.keep(latents, self.points.at[i + 1] if i + 1 < total else CLEAN)
            yield Step(i, total, self.points.at[i].timestep, latents, x0, since(started), self.pixels)
            started = time.perf_counter()


def since(started: float) -> float:
    """Milliseconds since a reading of ``time.perf_counter``."""
    return (time.perf_counter() - started) * 1e3
