"""Learned rounding, up or down: AdaRound (Nagel et al. 2020, 2004.10568) over the whole network, or block after block.

AdaRound and BRECQ (2102.05426) fit layer after layer, or block after block, to the float network's. Here the unit is the
network if the recipe does not say otherwise, since the sampler sees nothing else than what it predicts. BRECQ warns that so large a
unit over-fits few items; a diffusion model makes as many as one wants. Steps of activations and biases are learned with the rounding,
as EDA-DM (2401.04585) learns them.

The penalty sum (1 - |2h - 1|^b) over the number of weights counts from a fifth of the iterations on; b falls from 20 to 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgediffusion.optimize.integers import LOW_BITS
from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.rounding._fit import Method, Parameters, Settings, fit
from edgediffusion.optimize.simulate import AdaRoundLayer, NearestLayer, SimulatedLayer, anneal, rounding_loss
from edgediffusion.optimize.state import LayerState

SETTINGS = Settings(rate_weights=2e-2, decay=False)  # the penalty needs its rate most at the end
WARM_UP, PENALTY = 0.2, 30.0


def round_weights(job: Job, settings: Settings = SETTINGS) -> dict[str, LayerState]:
    def parameters(layers: Sequence[SimulatedLayer]) -> Parameters:
        return [([layer.rounding for layer in layers if isinstance(layer, AdaRoundLayer)], settings.rate_weights)]

    return fit(job, Method(settings, lambda bits: AdaRoundLayer if bits[0] <= LOW_BITS else NearestLayer, parameters, _penalty))


def _penalty(layers: Sequence[SimulatedLayer], done: float) -> torch.Tensor | None:
    rounded = [layer for layer in layers if isinstance(layer, AdaRoundLayer)]
    if done < WARM_UP or not rounded:
        return None
    total = torch.stack([rounding_loss(layer, anneal(done, warm_up=WARM_UP)) for layer in rounded]).sum()
    return PENALTY * total / sum(layer.weight.numel() for layer in rounded)
