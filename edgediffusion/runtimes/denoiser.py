"""The network in the loop: asks it, applies guidance, and turns what it predicts into an estimate of x_0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgediffusion.bundle import Folded
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.guidance import Guidance, Threshold
from edgediffusion.runtimes.network import Call, Network
from edgediffusion.runtimes.schedules import Point, Points

if TYPE_CHECKING:
    from edgediffusion.runtimes.corrections import Corrector

Observe = Callable[[int, Mapping[str, np.ndarray]], None]


@dataclass(frozen=True)
class Denoiser:
    """``denoise(x, i)`` for a sampler: x is float32 [images, ...], the result the estimate of x_0, of the same shape.

    ``conditions`` are fed with every call, each [rows, ...]. With classifier-free ``guidance`` a call has two rows per
    image, the unconditional ones first as in diffusers; ``conditional`` is a denoiser of the second half of the rows, for
    the points where guidance is off. ``observe`` gets the number of the step and a copy of each array fed, of each step
    whose call is not answered from a cache in part. ``corrector`` changes the guided prediction before it becomes an estimate
    of x_0, ``threshold`` that estimate. ``aside`` makes a network for questions that are no step of the trajectory.
    """

    network: Network
    aside: Callable[[], Network]
    prediction: str
    points: Points
    conditions: Mapping[str, np.ndarray]
    guidance: Guidance | None = None
    conditional: Denoiser | None = None
    threshold: Threshold | None = None
    observe: Observe | None = None
    corrector: Corrector | None = None

    def __call__(self, x: np.ndarray, i: int) -> np.ndarray:
        point = self.points.at[i]
        rows = self._at(point)
        output = rows._guided(rows.network(Call(i, x, point.timestep, rows.conditions, self._observer(i))), point)
        if self.corrector is not None:
            self.corrector.prediction(output, x, i)
        x0 = to_x0(self.prediction, x, output, point)
        return x0 if self.threshold is None else self.threshold(x0)

    def together(self, states: Sequence[np.ndarray], indices: Sequence[int]) -> list[np.ndarray]:
        """The estimates of x_0 for several states, each at its ``points.at[i]``, by one call; neither observed nor corrected.

        The denoiser is one of as many images as all states have together; guidance is on at all of their points, or at none.
        """
        points = [self.points.at[i] for i in indices]
        rows, first = self._at(points[0]), points[0]
        timesteps = np.repeat([point.timestep for point in points], len(states[0]))
        call = Call(indices[0], np.concatenate(states), first.timestep, rows.conditions, timesteps=timesteps)
        outputs = np.split(rows._guided(rows.network(call), first), len(states))
        found = [to_x0(self.prediction, x, output, at) for x, output, at in zip(states, outputs, points, strict=True)]
        return found if self.threshold is None else [self.threshold(x0) for x0 in found]

    def predict(self, x: np.ndarray, at: Point) -> np.ndarray:
        """The guided prediction itself, uncorrected, for x [images, ...] at any point; a new array."""
        rows = self._at(at)
        return rows._guided(rows.aside()(Call(0, x, at.timestep, rows.conditions)), at)

    def _at(self, point: Point) -> Denoiser:
        """The denoiser to ask at a point: half the rows where guidance is off, if the graphs take so few."""
        if self.guidance is None or self.conditional is None or self.guidance.is_on(point):
            return self
        return self.conditional

    def _observer(self, i: int) -> Callable[[Mapping[str, np.ndarray]], None] | None:
        observe = self.observe
        return None if observe is None else lambda fed: observe(i, {name: array.copy() for name, array in fed.items()})

    def _guided(self, rows: np.ndarray, at: Point) -> np.ndarray:
        output = rows.astype(np.float32)  # a copy: the network will write there again
        if self.guidance is None:
            return output
        return self.guidance(output) if self.guidance.is_on(at) else np.split(output, 2)[1]


def to_x0(prediction: str, x: np.ndarray, output: np.ndarray, at: Point) -> np.ndarray:
    """The estimate of x_0 at x = alpha x_0 + sigma noise from any prediction.

    epsilon: the noise. v: alpha noise - sigma x_0 (Salimans and Ho 2022), for alpha^2 + sigma^2 = 1. flow: noise - x_0,
    for alpha + sigma = 1. sample: x_0.
    """
    if prediction == "epsilon":
        return (x - at.sigma * output) / at.alpha
    if prediction == "v":
        return at.alpha * x - at.sigma * output
    if prediction == "flow":
        return x - at.sigma * output
    return output


def to_epsilon(prediction: str, x: np.ndarray, output: np.ndarray, at: Point) -> np.ndarray:
    """The estimate of the noise at x = alpha x_0 + sigma noise from any prediction, see ``to_x0``; for sigma > 0."""
    if prediction == "epsilon":
        return output
    if prediction == "v":
        return at.sigma * x + at.alpha * output
    if prediction == "flow":
        return x + at.alpha * output
    return (x - at.alpha * output) / at.sigma


def epsilon_gain(prediction: str, at: Point) -> float:
    """How many times an error of the prediction is the error of epsilon that it makes: the slope of ``to_epsilon``."""
    if prediction == "sample":
        return -at.alpha / at.sigma
    return 1.0 if prediction == "epsilon" else at.alpha


def check_predictable(prediction: str, points: Points, sampler: str) -> None:
    """Refuse to divide by alpha = 0: from pure noise alone, a prediction of noise says nothing about x_0."""
    if prediction == "epsilon" and any(point.alpha == 0 for point in points.at):
        raise ArgumentError(
            f"The sampler '{sampler}' starts from pure noise, where a network that predicts noise says nothing",
            allowed="euler, euler-ancestral, dpmpp-2m",
        )


def check_folded(folded: Folded | None, points: Points, steps: int, sampler: str) -> None:
    """Refuse time steps that a folded denoiser has no rows for. They are compared as they are fed, in float32."""
    if folded is None:
        return
    known = {np.float32(t) for t in folded.timesteps}
    lacking = [point.timestep for point in points.at if np.float32(point.timestep) not in known]
    if lacking:
        raise ArgumentError(
            f"This bundle's time embedding was folded for {folded.steps} steps of the sampler '{folded.sampler}'",
            got=f"{steps} steps of '{sampler}', which calls the network at {_listed(lacking)}",
            allowed=f"the time steps {_listed(folded.timesteps)}",
            do=f"Fold the bundle that it was made from again: edgediffusion fold BUNDLE --steps {steps} --sampler {sampler} -o NEW",
        )


def _listed(timesteps: Sequence[float], most: int = 30) -> str:
    told = [f"{t:g}" for t in timesteps]
    return ", ".join(told if len(told) <= most else [*told[: most - 2], "...", told[-1]])


def guidance_embedding(w: float, width: int) -> np.ndarray:
    """float32 [width]: [sin(1000 w f), cos(1000 w f)], f_i = 10000^(-i / (h - 1)) for h = width // 2; a zero if odd.

    Meng et al. 2023 (2210.03142) as in diffusers' ``get_guidance_scale_embedding``, w = guidance_scale - 1. Frequencies
    and angles are rounded to float32 like diffusers': at angles of thousands the rounding is visible in the sine.
    """
    half = width // 2
    step = np.float32(math.log(10000.0) / (half - 1))
    frequencies = np.exp((np.arange(half, dtype=np.float32) * -step).astype(np.float64)).astype(np.float32)
    angles = (np.float32(w) * np.float32(1000.0) * frequencies).astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)]).astype(np.float32)
