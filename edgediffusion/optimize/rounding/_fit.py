"""Fit simulated layers to the float network: the loop that the methods of this folder share."""

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
    """Rates of Adam; with ``decay`` they fall to zero along a cosine. ``batch`` is of items, each two rows where there is guidance."""

    iterations: int = 400
    batch: int = 16
    rate_weights: float = 1e-2
    rate_steps: float = 2e-3
    rate_bias: float = 2e-3
    decay: bool = True


Parameters = Callable[[Sequence[SimulatedLayer]], list[tuple[list[torch.nn.Parameter], float]]]
Penalty = Callable[[Sequence[SimulatedLayer], float], torch.Tensor | None]


def fit(
    job: Job, settings: Settings, kind: Callable[[tuple[int, int]], type[SimulatedLayer]], parameters: Parameters, penalty: Penalty
) -> dict[str, LayerState]:
    """Learn with the squared error of what the network predicts, and of the guided prediction, as the loss.

    The loss is divided by that of rounding to nearest. ``kind`` chooses the layers by their bits, ``parameters`` says which of
    their parameters are learned beside steps of activations and biases, at which rates; ``penalty`` takes the part that is
    done, 0..1.
    """
    wanted = {name: job.bits(name) for name in job.layers if job.is_quantized(name)}
    if not wanted:
        return {}
    with torch.no_grad():
        targets = [job.module(**tensors(item)) for item in job.items]
    with torch.no_grad(), simulated(job.module, job.layers, wanted):
        nearest = float(np.mean([_error(job, np.array([i]), targets).item() for i in range(0, len(targets), 8)]))
    with simulated(job.module, job.layers, wanted, kind) as simulation:
        layers = list(simulation.values())

        def loss_of(chosen: np.ndarray, done: float) -> torch.Tensor:
            loss, further = _error(job, chosen, targets) / max(nearest, 1e-12), penalty(layers, done)
            return loss if further is None else loss + further

        _descend(job, settings, [*_common(layers, settings), *parameters(layers)], loss_of)
        return {name: layer.learned(job.layers[name]) for name, layer in simulation.items()}


def _common(layers: Sequence[SimulatedLayer], settings: Settings) -> list[tuple[list[torch.nn.Parameter], float]]:
    steps = [layer.log_step for layer in layers if layer.activation_bits < 16]
    return [(steps, settings.rate_steps), ([layer.bias for layer in layers], settings.rate_bias)]


def _descend(
    job: Job,
    settings: Settings,
    parameters: Sequence[tuple[list[torch.nn.Parameter], float]],
    loss_of: Callable[[np.ndarray, float], torch.Tensor],
) -> None:
    rng = np.random.default_rng(job.seed)
    optimizer = torch.optim.Adam([{"params": p, "lr": rate, "rate": rate} for p, rate in parameters if p])
    for iteration in range(settings.iterations):
        done = iteration / settings.iterations
        loss = loss_of(rng.choice(len(job.items), min(settings.batch, len(job.items)), replace=False), done)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (cosine(done) if settings.decay else 1.0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        job.progress((iteration + 1) / settings.iterations)


def _error(job: Job, chosen: np.ndarray, targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the predictions, and of the guided ones where an item has two rows."""
    feeds = [tensors(job.items[i]) for i in chosen]
    rows = len(targets[chosen[0]])
    merged = {name: torch.cat([_rows(feed[name], rows) for feed in feeds]) for name in feeds[0]}
    errors = (job.module(**merged) - torch.cat([targets[i] for i in chosen])).split(rows)
    error = torch.stack(errors)
    loss = error.square().mean()
    if job.guidance_scale is not None and rows == 2:
        guided = error[:, 0] + job.guidance_scale * (error[:, 1] - error[:, 0])
        loss = loss + guided.square().mean()
    return loss


def _rows(value: torch.Tensor, rows: int) -> torch.Tensor:
    """With one entry for each row, as several items in one batch need it; the time step has one for all."""
    return value if len(value) == rows else value.expand(rows, *value.shape[1:])
