"""Align Your Steps: Sabour et al. 2024 (2404.14507), the tables that its authors published for three networks.

For 10 steps of Stable Diffusion 1.5 and XL these are the timesteps of diffusers' ``AysSchedules``. For other numbers the
logarithms of the noise levels are interpolated over the index, as in the authors' quick start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.options import check_choice

# Levels sigma / alpha of ten steps and the end of the last: the lowest level of training, in place of which sampling goes to 0.
LEVELS = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
TIMESTEPS = {
    "sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}


@dataclass(frozen=True)
class Options:
    """``model`` is the network that the steps were aligned for: sd, sdxl or svd."""

    model: str = "sd"

    def __post_init__(self) -> None:
        check_choice("model", self.model, tuple(LEVELS))


DEFAULT = Options()


def timesteps(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT, *, with_end: bool) -> np.ndarray:
    if steps == 10 and options.model in TIMESTEPS and schedule.train_steps == 1000:
        return np.array(TIMESTEPS[options.model], float)
    table = _training_levels(schedule)
    wanted = levels(steps, options.model)
    if wanted[0] > 1.01 * table[-1]:
        raise ArgumentError(
            f"The steps for '{options.model}' begin with more noise than this network was trained on",
            got=f"sigma / alpha {wanted[0]:g}",
            allowed=f"up to {table[-1]:.4g}",
            do="Take the steps of another model.",
        )
    found: np.ndarray = np.interp(np.log(wanted), np.log(table), np.arange(len(table)))
    return found


def levels(steps: int, model: str) -> np.ndarray:
    """float64 [steps]: the noise levels; the table's own for 10 steps."""
    table = np.log(LEVELS[model])
    found: np.ndarray = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), table))[:-1]
    return found


def _training_levels(schedule: NoiseSchedule) -> np.ndarray:
    from edgediffusion.runtimes.schedules import NEARLY_ZERO, alpha_bars  # which finds spacings by their names

    bars = alpha_bars(schedule, end=NEARLY_ZERO)
    found: np.ndarray = np.sqrt((1.0 - bars) / bars)
    return found
