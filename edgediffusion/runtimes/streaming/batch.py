"""The stream batch: one call of the network takes each of the last frames one step further. StreamDiffusion, section 3.1.

A frame enters in the first row and moves down a row a call; the last row leaves as a picture. So a frame takes as many calls as there are
steps, and a picture leaves at every call. Noise is fixed for each row: frames that are alike give pictures that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgediffusion.runtimes.denoiser import to_epsilon
from edgediffusion.runtimes.samplers.lcm import boundary
from edgediffusion.runtimes.schedules import Point
from edgediffusion.runtimes.streaming import residual

# (rows [r, c, h, w], time steps [r]) -> what the network predicts, a new array like the rows
Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class StreamBatch:
    """``step`` takes a new frame's latent in and gives the oldest one's out.

    ``points`` are those of the steps, ``noise`` [steps, c, h, w] is added on the way to each. ``guidance`` is one of ``residual.KINDS``.
    The network's calls have the rows that ``residual.fed`` says.
    """

    points: Sequence[Point]
    noise: np.ndarray
    predict: Predict
    prediction: str = "epsilon"
    guidance: str = "none"
    scale: float = 1.0
    delta: float = 1.0

    def __post_init__(self) -> None:
        self._alpha, self._sigma = (_column([getattr(p, part) for p in self.points]) for part in ("alpha", "sigma"))
        self._skip, self._out = (_column(part) for part in zip(*(boundary(p.timestep) for p in self.points), strict=True))
        self._timesteps = np.array([p.timestep for p in self.points], np.float32)
        self.restart()

    def restart(self) -> None:
        """Forget every frame that is under way."""
        self._waiting = np.zeros_like(self.noise[1:])
        self._stock = np.zeros_like(self.noise)
        self._entered = 0

    def enter(self, latent: np.ndarray) -> np.ndarray:
        """A frame's latent [1, c, h, w] noised to the first step: what ``step`` takes."""
        noised: np.ndarray = self._alpha[:1] * latent + self._sigma[:1] * self.noise[:1]
        return noised

    def step(self, x: np.ndarray) -> np.ndarray | None:
        """``x`` [1, c, h, w] at the first step; that of the frame which entered len(points) - 1 calls ago, or None."""
        states = np.concatenate([x, self._waiting])
        self._stock = np.concatenate([self.noise[:1], self._stock[:-1]]) if len(states) > 1 else self._stock
        epsilon = self._epsilon(states)
        x0 = self._consistent(states, epsilon)
        if self.guidance in residual.RESIDUAL:
            self._restock(epsilon)
        self._waiting = self._alpha[1:] * x0[:-1] + self._sigma[1:] * self.noise[1:]
        self._entered += 1
        return x0[-1:] if self._entered >= len(self.points) else None

    def _epsilon(self, states: np.ndarray) -> np.ndarray:
        fed, times = residual.fed(self.guidance, states), residual.fed(self.guidance, self._timesteps)
        output = self.predict(fed, times)
        if self.prediction != "epsilon":
            points = [*self.points[: len(fed) - len(states)], *self.points]
            output = np.stack([to_epsilon(self.prediction, x, o, p) for x, o, p in zip(fed, output, points, strict=True)])
        return residual.guided(self.guidance, output, self._stock, self.scale, self.delta)

    def _consistent(self, x: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
        """The consistency function: c_skip x + c_out (x - sigma epsilon) / alpha."""
        result: np.ndarray = self._skip * x + self._out * (x - self._sigma * epsilon) / self._alpha
        return result

    def _restock(self, epsilon: np.ndarray) -> None:
        """The noise that would lead from what a row has become to its next state, as far as it is not the row's fixed noise."""
        moved = self._consistent(self._sigma * self._stock, epsilon)
        one = np.ones_like(self._alpha[:1])
        moved = moved * np.concatenate([self._alpha[1:], one]) / np.concatenate([self._sigma[1:], one])
        self._stock = np.roll(self.noise, -1, axis=0) + moved


def _column(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float32).reshape(-1, 1, 1, 1)
