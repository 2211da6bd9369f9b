"""The loop: a generator of steps around a sampler, and what a generation leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from edgediffusion.runtimes.corrections import Corrector
from edgediffusion.runtimes.graph import require_finite
from edgediffusion.runtimes.images import to_images
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.painting import Keep
from edgediffusion.runtimes.samplers import Denoise, Sampler
from edgediffusion.runtimes.samplers._parallel import Parallel, in_order
from edgediffusion.runtimes.schedules import CLEAN, Points
from edgediffusion.runtimes.windows import Window


@dataclass(frozen=True)
class Step:
    """The state after one step. ``latents`` and the estimate of x_0, ``denoised``, are float32 [images, c, h, w].

    ``calls`` of the network were made since the last step: one by most samplers. One that is parallel in time makes those of a
    round before its first state, and none before the others.
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    denoised: np.ndarray
    calls: int
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
    """``pixels`` is float32 [images, height, width, channels] in 0..1; ``latents`` is what they were decoded from.

    ``calls`` is how many times the sampler waited for the network: a window of states that is asked about at once counts as one.
    """

    pixels: np.ndarray
    latents: np.ndarray
    seeds: tuple[int, ...]
    calls: int
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
    is put back then. ``graph`` names the graph that is asked at a time step. With ``window``, a sampler that is parallel in time asks
    about many states in one call.
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
    window: Window | None = None

    def __iter__(self) -> Iterator[Step]:
        """Raises EngineError when the network returns numbers that are not finite."""
        total, asked = len(self.points), _Asked(self)
        started, calls = time.perf_counter(), 0
        for i, latents in enumerate(self._states(asked)):
            if i + 1 < total:
                self.corrector.state(latents, i + 1)
            if self.keep is not None:
                self.keep(latents, self.points.at[i + 1] if i + 1 < total else CLEAN)
            x0 = asked.x0.pop(i)  # every step is asked about
            yield Step(i, total, self.points.at[i].timestep, latents, x0, asked.calls - calls, since(started), self.pixels)
            started, calls = time.perf_counter(), asked.calls

    def _states(self, asked: _Asked) -> Iterator[np.ndarray]:
        if self.window is None:
            return self.sampler.sample(asked.one, self.x, self.points, self.noise)
        return in_order(cast(Parallel, self.sampler).rounds(asked.many, self.x, self.points, self.noise))


@dataclass
class _Asked:
    """The network as a loop's sampler asks it: the last estimate of x_0 for each step, and how many calls there were."""

    loop: Loop
    x0: dict[int, np.ndarray] = field(default_factory=dict)
    calls: int = 0

    def one(self, x: np.ndarray, i: int) -> np.ndarray:
        self.calls += 1
        return self._finite(self.loop.denoise(x, i), i)

    def many(self, states: Sequence[np.ndarray], indices: Sequence[int]) -> list[np.ndarray]:
        window, found = self.loop.window, list[np.ndarray]()
        assert window is not None  # or it was not asked for
        for group in window.groups(indices):
            self.calls += 1
            found += window(states[group], indices[group])
        return [self._finite(x0, i) for x0, i in zip(found, indices, strict=True)]

    def _finite(self, x0: np.ndarray, i: int) -> np.ndarray:
        if not np.isfinite(x0).all():
            timestep = self.loop.points.at[i].timestep
            where = f" in step {i + 1} of {len(self.loop.points)}, at time step {timestep:g}"
            require_finite(x0, self.loop.graph(timestep), where)
        self.x0[i] = x0
        return x0


def since(started: float) -> float:
    """Milliseconds since a reading of ``time.perf_counter``."""
    return (time.perf_counter() - started) * 1e3
