"""Learned codes: every weight may move to any code, with straight-through gradients and learned steps.

LSQ (Esser et al. 2020, 1902.08153) on the pipeline's own calibration items, the float network being the teacher: no training
data, and minutes instead of a training. EfficientDM (2310.03270) does the same with low-rank updates to save memory. Weights
move by more than the one code that AdaRound allows, which at 4 bits is worth decibels: docs/quantization.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgediffusion.optimize.integers import LOW_BITS
from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.rounding._fit import Method, Parameters, Settings, fit
from edgediffusion.optimize.simulate import NearestLayer, SimulatedLayer, StraightThroughLayer
from edgediffusion.optimize.state import LayerState

SETTINGS = Settings()


def round_weights(job: Job, settings: Settings = SETTINGS) -> dict[str, LayerState]:
    def parameters(layers: Sequence[SimulatedLayer]) -> Parameters:
        learned = [layer for layer in layers if isinstance(layer, StraightThroughLayer)]
        return [
            ([layer.latent for layer in learned], settings.rate_weights),
            ([layer.log_weight_step for layer in learned], settings.rate_steps),
        ]

    return fit(job, Method(settings, lambda bits: StraightThroughLayer if bits[0] <= LOW_BITS else NearestLayer, parameters))
