"""The denoiser of a picture: which rows of its conditions the network is asked about, together or apart, guided or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from edgediffusion.runtimes.calls import in_halves, with_channels
from edgediffusion.runtimes.control import with_scales
from edgediffusion.runtimes.denoiser import Denoiser
from edgediffusion.runtimes.network import Graphs, Network, Policy
from edgediffusion.runtimes.request import Plan


@dataclass(frozen=True)
class Rows:
    """``fixed`` says that the graph takes one number of rows only; ``controls`` is how many ControlNets lead it."""

    graphs: Graphs
    policy: Policy
    prediction: str
    controls: int
    fixed: bool

    def denoiser(self, plan: Plan, conditions: Mapping[str, np.ndarray], beside: np.ndarray | None) -> Denoiser:
        """``conditions`` are those of ``Prepared``; ``beside`` are further channels of the network's input."""
        if not plan.classifier_free:
            return replace(self._of(plan, conditions, beside, 1), threshold=plan.threshold)
        guided = replace(self._of(plan, conditions, beside, 2), guidance=plan.guidance, threshold=plan.threshold)
        # Where guidance is off, half of the rows are work for nothing, unless the graph was made for so many rows only.
        if all(map(plan.guidance.is_on, plan.points.at)) or self.fixed:
            return guided
        second = {name: rows[plan.images :] for name, rows in conditions.items()}
        return replace(guided, conditional=self._of(plan, second, beside, 1))

    def _of(self, plan: Plan, conditions: Mapping[str, np.ndarray], beside: np.ndarray | None, rows: int) -> Denoiser:
        """A denoiser without guidance, of so many ``rows`` an image."""
        apart = rows == 2 and plan.separate
        called = plan.images * (1 if apart else rows)
        shapes = {name: (called, *array.shape[1:]) for name, array in conditions.items()}
        channels = plan.latent_shape[1] + (0 if beside is None else beside.shape[1])
        shapes["sample"] = (called, channels, *plan.latent_shape[2:])
        ask = partial(self.graphs.network, plan.cache or self.policy, shapes, len(plan.points))

        leads = plan.control.leads(self.controls)

        def led(network: Network, unled: int) -> Network:
            return with_scales(network, leads, plan.points, unled=unled if plan.control.guess else None)

        def network(aside: str) -> Network:
            if apart:
                halves = in_halves(led(ask(aside=f"{aside} unconditional"), plan.images), led(ask(aside=aside), 0))
                return with_channels(halves, beside)
            return with_channels(led(ask(aside=aside), plan.images if rows == 2 else 0), beside)

        return Denoiser(network(""), partial(network, "aside"), self.prediction, plan.points, conditions)
