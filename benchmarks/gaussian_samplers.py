"""Solvers where the answer is known: Gaussian data, the exact denoiser. python benchmarks/gaussian_samplers.py

Data N(0, s^2) with s = 0.5 has the denoiser x_0 = alpha s^2 x / (alpha^2 s^2 + sigma^2), and states that keep their quotient by
their deviation. The first table is a deterministic solver's error at the end of a cosine path from t = 0.9 to 0.1 in even steps
of lambda, from x = 1; the second the deviation of what a stochastic one draws, 40,000 numbers, which should be 0.5.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from _report import save

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import resolve
from edgediffusion.runtimes.schedules import Points
from edgediffusion.text import markdown_table

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.runtimes.test_samplers import gaussian_path_error

S = 0.5
DETERMINISTIC = ("ddim", "heun", "dpm2", "lms", "pndm", "dpmpp-2m", "dpmpp-2m:order=3", "dpmpp-2s", "deis", "deis:order=3")
DETERMINISTIC = (*DETERMINISTIC, "unipc", "unipc:kind=bh1", "unipc:order=3", "sa-solver:tau=0")
STOCHASTIC = ("dpmpp-3m-sde:source=diffusers", "dpmpp-3m-sde", "dpmpp-2m-sde", "sa-solver", "dpm2-ancestral", "ddpm", "euler-ancestral")
PATH_STEPS, DRAWN_STEPS, NUMBERS = (10, 40, 160, 320), (20, 50, 100, 200), 40_000
SCHEDULE = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, spacing="trailing", set_alpha_to_one=False)


def main() -> None:
    errors = {name: [gaussian_path_error(name, steps) for steps in PATH_STEPS] for name in DETERMINISTIC}
    orders = {name: math.log2(found[-2] / found[-1]) for name, found in errors.items()}
    spreads = {name: [spread(name, steps) for steps in DRAWN_STEPS] for name in STOCHASTIC}
    rows = [[name, *(f"{e:.1e}" for e in found), f"{orders[name]:.2f}"] for name, found in errors.items()]
    print(markdown_table(["sampler", *map(str, PATH_STEPS), "order"], rows))
    print(markdown_table(["sampler", *map(str, DRAWN_STEPS)], [[name, *(f"{s:.3f}" for s in found)] for name, found in spreads.items()]))
    save("gaussian_samplers", {"path_steps": PATH_STEPS, "errors": errors, "drawn_steps": DRAWN_STEPS, "deviations": spreads})


def spread(text: str, steps: int) -> float:
    _, sampler = resolve(text)
    points, noise = sampler.points(SCHEDULE, steps), TorchNoise(4)
    *_, last = sampler.sample(lambda x, i: exact(points, x, i), points.start(noise.normal((NUMBERS,))), points, noise)
    return float(last.std())


def exact(points: Points, x: np.ndarray, i: int) -> np.ndarray:
    at = points.at[i]
    return np.float32(at.alpha * S**2 / (at.alpha**2 * S**2 + at.sigma**2)) * x


if __name__ == "__main__":
    main()
