"""The cheapest steps by dynamic programming: Watson et al. 2021 (2106.03802), algorithm 1, over a table of costs of yours.

    --spacing dp:costs=costs.npy

The file, .npy or .json, holds a matrix L of n + 1 rows and columns: L[t, s] is what a step from t down to s costs, for s < t;
other entries are not read, and infinity forbids a step. 0 is the clean picture, n the noisiest training timestep; n divides
the number of training timesteps, of which t is number t T / n - 1. In the paper a cost is a term of the variational bound.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError


@dataclass(frozen=True)
class Options:
    costs: str = ""


DEFAULT = Options()


def timesteps(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT, *, with_end: bool) -> np.ndarray:
    """Raises:
    ArgumentError: no table, one that cannot be used, or one without a way in so many steps.
    """
    costs = read_costs(options.costs)
    n = len(costs) - 1
    if schedule.train_steps % n:
        raise ArgumentError(
            f"The table '{options.costs}' does not fit the network's {schedule.train_steps} training timesteps",
            got=f"{n + 1} rows",
            allowed="one row for each of n evenly spaced timesteps, and one for the clean picture",
        )
    path = cheapest(costs, steps)
    if not path:
        raise ArgumentError("The table of costs has no way in so many steps", got=steps, allowed=f"1 to {n}, where no cost is infinite")
    return np.array(path[:-1], float) * (schedule.train_steps // n) - 1


def cheapest(costs: np.ndarray, steps: int) -> tuple[int, ...]:
    """The descending path n, ..., 0 of ``steps`` steps with the least sum of costs [n + 1, n + 1]; empty if there is none.

    D[k, t] = min over s < t of D[k - 1, s] + L[t, s], the least cost from t down to 0 in k steps.
    """
    allowed = np.where(np.tri(len(costs), k=-1, dtype=bool), costs, np.inf)
    least = np.where(np.arange(len(costs)) == 0, 0.0, np.inf)
    choices = []
    for _ in range(steps):
        sums = least + allowed
        choices.append(np.argmin(sums, axis=1))
        least = sums.min(axis=1)
    if not np.isfinite(least[-1]):
        return ()
    path = [len(costs) - 1]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return tuple(path)


def read_costs(file: str) -> np.ndarray:
    """float64 [n + 1, n + 1], n >= 1.

    Raises:
        ArgumentError: no such file, or no table of costs.
    """
    allowed = "a .npy or .json file with a square matrix of numbers, none of them NaN where a row steps down"
    if not file:
        raise ArgumentError("The spacing 'dp' needs a table of costs", allowed=allowed, do="Name it: dp:costs=FILE")
    try:
        costs: np.ndarray
        if Path(file).suffix == ".npy":
            costs = np.asarray(np.load(file, allow_pickle=False), float)
        else:
            costs = np.array(json.loads(Path(file).read_text(encoding="utf-8")), float)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ArgumentError(f"The table of costs '{file}' cannot be read", got=error, allowed=allowed) from None
    square = costs.ndim == 2 and costs.shape[0] == costs.shape[1] and len(costs) > 1
    if not square or np.isnan(costs[np.tri(len(costs), k=-1, dtype=bool)]).any() or (costs == -np.inf).any():
        raise ArgumentError(f"The table of costs '{file}' cannot be used", got=f"shape {costs.shape}", allowed=allowed)
    return costs
