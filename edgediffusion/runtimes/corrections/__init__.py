"""Corrections of quantization noise: one file per method, each with a frozen dataclass ``Method``; its fields are options.

A method that is measured beforehand (``edgediffusion correct``, ``optimize/correct.py``) has

    OUTLIERS: float | None                     pairs beyond so many standard deviations are left out, by a second pass
    DRIFT: bool                                it wants to know how far the quantized trajectory strays as well
    fit(moments: Moments) -> Parameters        from measured pairs to the numbers of its paper
    terms(parameters: Parameters) -> Terms     from those numbers to what is done at each step

and one that finds out while it draws has

    start(run: Run) -> Corrector

What is corrected is the network's guided prediction in its own parametrization: epsilon, v, flow or x_0. The papers write
epsilon. At one point of a trajectory an error of any of them is a known multiple of an error of epsilon
(``denoiser.epsilon_gain``), so biases and spreads are the papers'; going by way of epsilon would divide by alpha = 0 at
pure noise. Only what a prediction is regressed on (k of PTQD) is the network's own output instead of epsilon.

Samplers know nothing of all this: a corrector changes the prediction before it becomes an estimate of x_0, the state
between two steps, and the noise that a sampler draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.schedules import Point, Points

if TYPE_CHECKING:
    from edgediffusion.runtimes.corrections._moments import Moments
    from edgediffusion.runtimes.samplers import Sampler

REGISTRY = "runtimes.corrections"
Parameters = Mapping[str, np.ndarray]  # float64, each [steps, ...]


@dataclass(frozen=True)
class Terms:
    """What is done at each step, each array [steps] or [steps, channels] (or [steps, 1] for all channels alike).

    prediction <- scale prediction + shift - spread z, z standard normal; ``residual`` is the standard deviation of the
    error that is left, for which a sampler adds that much less noise; ``drift`` is added to the state before the step.
    """

    scale: np.ndarray
    shift: np.ndarray
    spread: np.ndarray | None = None
    residual: np.ndarray | None = None
    drift: np.ndarray | None = None


@dataclass(frozen=True)
class Deployment:
    """What the statistics of a correction hold for, and nothing else.

    ``model`` is the digest of the exported pipeline, ``graph`` that of the denoiser's files, ``state`` that of the
    quantization state; empty where the bundle's history does not tell.
    """

    model: str
    graph: str
    state: str
    sampler: str
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Run:
    """One generation, as far as a correction may know of it.

    ``predict`` is one more call of the network: the guided prediction for x [images, ...] at a point. ``noise`` is a
    stream of the correction's own, so that what a sampler draws stays the same.
    """

    deployment: Deployment
    prediction: str
    sampler: Sampler
    points: Points
    noise: Noise
    predict: Callable[[np.ndarray, Point], np.ndarray]


class Corrector:
    """The state of a correction in one generation; this one changes nothing. Arrays are changed in place."""

    def prediction(self, output: np.ndarray, x: np.ndarray, i: int) -> None:
        """The guided prediction ``output`` of step i, made from ``x``; both float32 [images, channels, ...]."""

    def state(self, x: np.ndarray, i: int) -> None:
        """The state before step i, for i > 0."""

    def noise(self, noise: Noise) -> Noise:
        """The stream that the sampler draws its noise from."""
        return noise


class Starts(Protocol):
    """A correction, ready for any number of generations."""

    def start(self, run: Run) -> Corrector:
        """Raises:
        ArgumentError: the correction is not made for this generation.
        """
        ...


class Measured(Protocol):
    """The shape of a method that is measured beforehand."""

    OUTLIERS: ClassVar[float | None]
    DRIFT: ClassVar[bool]

    def fit(self, moments: Moments) -> dict[str, np.ndarray]: ...

    def terms(self, parameters: Parameters) -> Terms: ...
