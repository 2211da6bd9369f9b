"""Learned rounding over the whole network: AdaRound (Nagel et al. 2020, 2004.10568) with LSQ steps and biases.

AdaRound and BRECQ (2102.05426) fit layer after layer, or block after block, to the float network's. Here the unit is the
network: the loss is the squared error of what it predicts, plus that of the guided prediction where items have a guidance
batch of two rows, since the sampler sees nothing else. BRECQ warns that so large a unit over-fits few items; a diffusion
model makes as many as one wants, at any step. Rounding, the steps of the activations (LSQ, Esser et al. 2020, 1902.08153)
and the biases are learned together, as EDA-DM (2401.04585) learns them.

The rounding loss, 0.01 sum (1 - |2h - 1|^b), starts after a fifth of the iterations; b falls from 20 to 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.simulate import SimulatedLayer, anneal, cosine, rounding_loss, simulated
from edgediffusion.optimize.state import LayerState


@dataclass(frozen=True)
class Settings:
    iterations: int = 600
    batch: int = 16  # items; each has two rows with guidance
    rate_rounding: float = 2e-2
    rate_step: float = 5e-3
    rate_bias: float = 2e-3
    rounding_weight: float = 0.01


def round_weights(job: Job, settings: Settings = Settings()) -> dict[str, LayerState]:
    wanted = {n: job.bits(n) for n in job.layers if job.is_quantized(n)}
    if not wanted:
        return {}
    targets = _targets(job)
    with simulated(job.module, job.layers, wanted) as layers:
        _fit(job, targets, layers, settings)
        return {name: _learned(job.layers[name], layer) for name, layer in layers.items()}


def _targets(job: Job) -> list[torch.Tensor]:
    """What the float network predicts for every item."""
    with torch.no_grad():
        return [job.module(**tensors(item)) for item in job.items]


def _fit(job: Job, targets: list[torch.Tensor], layers: dict[str, SimulatedLayer], settings: Settings) -> None:
    rng = np.random.default_rng(job.seed)
    low_bits = [layer for layer in layers.values() if layer.top < 127]
    groups = [
        ([layer.rounding for layer in low_bits], settings.rate_rounding),
        ([layer.log_step for layer in layers.values() if layer.activation_bits < 16], settings.rate_step),
        ([layer.bias for layer in layers.values()], settings.rate_bias),
    ]
    optimizer = torch.optim.Adam([{"params": params, "lr": rate, "rate": rate} for params, rate in groups if params])
    for layer in layers.values():
        layer.rounding.requires_grad_(layer in low_bits)
        layer.hard = layer not in low_bits
    count = sum(layer.weight.numel() for layer in low_bits)
    power = float(np.mean([t.square().mean().item() for t in targets]))
    for iteration in range(settings.iterations):
        done = iteration / settings.iterations
        chosen = rng.choice(len(targets), min(settings.batch, len(targets)), replace=False)
        loss = _error(job, chosen, targets) / power
        if done >= 0.2 and count:
            pull = torch.stack([rounding_loss(layer, anneal(done)) for layer in low_bits]).sum() / count
            loss = loss + settings.rounding_weight * pull
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * cosine(done)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        job.progress((iteration + 1) / settings.iterations)


def _error(job: Job, chosen: np.ndarray, targets: list[torch.Tensor]) -> torch.Tensor:
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


def _learned(state: LayerState, layer: SimulatedLayer) -> LayerState:
    step = float(torch.exp(layer.log_step.detach()))
    return replace(state, codes=layer.codes(), bias=layer.bias.detach().numpy(), input_clip=state.input_clip * step)
