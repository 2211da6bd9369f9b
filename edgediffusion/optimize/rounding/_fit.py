"""Fit simulated layers to the float network: what the methods of this folder that learn share.

The unit is the whole network, or with ``reconstruct = "block"`` each block of it in turn (_blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.simulate import SimulatedLayer, cosine, simulated
from edgediffusion.optimize.state import LayerState


@dataclass(frozen=True)
class Settings:
    """Rates of Adam; with ``decay`` they fall to zero along a cosine. ``batch`` is of items, each two rows where there is guidance.

    ``iterations`` are of a unit.
    """

    iterations: int = 400
    batch: int = 16
    rate_weights: float = 1e-2
    rate_steps: float = 2e-3
    rate_bias: float = 2e-3
    decay: bool = True


Parameters = list[tuple[list[torch.nn.Parameter], float]]


@dataclass(frozen=True)
class Method:
    """``kind`` chooses the layers by their bits, ``parameters`` says which of their parameters are learned beside steps of activations
    and biases, at which rates; ``penalty`` takes the part that is done, 0..1."""

    settings: Settings
    kind: Callable[[tuple[int, int]], type[SimulatedLayer]]
    parameters: Callable[[Sequence[SimulatedLayer]], Parameters]
    penalty: Callable[[Sequence[SimulatedLayer], float], torch.Tensor | None] = lambda layers, done: None


def fit(job: Job, method: Method) -> dict[str, LayerState]:
    """The quantized layers with what was learned."""
    from edgediffusion.optimize.rounding._blocks import fit_blocks

    wanted = {name: job.bits(name) for name in job.layers if job.is_quantized(name)}
    if not wanted:
        return {}
    return fit_blocks(job, method, wanted) if job.recipe.reconstruct == "block" else _fit_network(job, method, wanted)


def _fit_network(job: Job, method: Method, wanted: dict[str, tuple[int, int]]) -> dict[str, LayerState]:
    """Learn with the squared error of what the network predicts, and of the guided prediction, as the loss."""
    with torch.no_grad():
        targets = [job.module(**tensors(item)) for item in job.items]
    with torch.no_grad(), simulated(job.module, job.layers, wanted):
        nearest = float(np.mean([_error(job, np.array([i]), targets).item() for i in range(0, len(targets), 8)]))
    with simulated(job.module, job.layers, wanted, method.kind) as layers:
        descend(
            method,
            [*layers.values()],
            lambda chosen: _error(job, chosen, targets) / max(nearest, 1e-12),
            len(targets),
            job.seed,
            job.progress,
        )
        return {name: layer.learned(job.layers[name]) for name, layer in layers.items()}


def descend(
    method: Method,
    layers: Sequence[SimulatedLayer],
    error: Callable[[np.ndarray], torch.Tensor],
    samples: int,
    seed: int,
    progress: Callable[[float], None],
) -> None:
    """Adam on ``error`` of some of so many samples, by index; the error of rounding to nearest is 1, so that penalties weigh alike."""
    settings, rng = method.settings, np.random.default_rng(seed)
    parameters = [*_common(layers, settings), *method.parameters(layers)]
    optimizer = torch.optim.Adam([{"params": p, "lr": rate, "rate": rate} for p, rate in parameters if p])
    for iteration in range(settings.iterations):
        done = iteration / settings.iterations
        loss = error(rng.choice(samples, min(settings.batch, samples), replace=False))
        further = method.penalty(layers, done)
        loss = loss if further is None else loss + further
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (cosine(done) if settings.decay else 1.0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress((iteration + 1) / settings.iterations)


def _common(layers: Sequence[SimulatedLayer], settings: Settings) -> Parameters:
    steps = [layer.log_step for layer in layers if layer.activation_bits < 16]
    return [(steps, settings.rate_steps), ([layer.bias for layer in layers], settings.rate_bias)]


def merged(job: Job, chosen: Sequence[int], rows: int) -> dict[str, torch.Tensor]:
    """The feeds of several items as one batch, each of ``rows``."""
    feeds = [tensors(job.items[i]) for i in chosen]
    return {name: torch.cat([_rows(feed[name], rows) for feed in feeds]) for name in feeds[0]}


def _error(job: Job, chosen: np.ndarray, targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the predictions, and of the guided ones where an item has two rows."""
    rows = len(targets[chosen[0]])
    errors = (job.module(**merged(job, chosen.tolist(), rows)) - torch.cat([targets[i] for i in chosen])).split(rows)
    error = torch.stack(errors)
    loss = error.square().mean()
    if job.guidance_scale is not None and rows == 2:
        guided = error[:, 0] + job.guidance_scale * (error[:, 1] - error[:, 0])
        loss = loss + guided.square().mean()
    return loss


def _rows(value: torch.Tensor, rows: int) -> torch.Tensor:
    """With one entry for each row, as several items in one batch need it; the time step has one for all."""
    return value if len(value) == rows else value.expand(rows, *value.shape[1:])
