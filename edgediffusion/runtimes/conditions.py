"""What the denoiser is fed beside the state and the time step: texts as their encoders see them, and embedded guidance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from edgediffusion.bundle import Sampling
from edgediffusion.errors import BundleError
from edgediffusion.runtimes.denoiser import guidance_embedding
from edgediffusion.runtimes.request import Plan
from edgediffusion.runtimes.text_encoder import TextEncoder

_LOOP_INPUTS = ("sample", "timestep", "timestep_cond")


class Conditions:
    """From a plan to arrays by the names of the denoiser's inputs.

    Raises:
        BundleError: an input of the denoiser is given by no encoder, or by two.
    """

    def __init__(self, sampling: Sampling, denoiser: str, inputs: Iterable[str], encoders: Sequence[TextEncoder]):
        """``denoiser`` is the name of the graph, for a person, and ``inputs`` all that the denoising graphs take."""
        self._sampling, self._encoders = sampling, tuple(encoders)
        self._wanted = set(inputs)
        self._check(denoiser)

    def __call__(self, plan: Plan) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """What is fed with every call, one row per image, or two with the unconditional ones first; and warnings."""
        texts = (*plan.negatives, *plan.prompts) if plan.classifier_free else plan.prompts
        encoded = [encoder(text) for text in texts for encoder in self._encoders]
        gathered: dict[str, list[np.ndarray]] = {}
        for item in encoded:
            for name in self._wanted & set(item.conditions):
                gathered.setdefault(name, []).append(item.conditions[name])
        conditions = {name: np.concatenate(rows) for name, rows in gathered.items()}
        if self._sampling.guidance == "embedded":
            row = guidance_embedding(plan.guidance_scale - 1.0, self._sampling.guidance_width)
            conditions["timestep_cond"] = np.tile(row, (plan.images, 1))
        cut = dict.fromkeys(item.cut for item in encoded if item.cut)
        return conditions, tuple(f"The prompt is too long; this part of it was left out: '{text}'" for text in cut)

    def _check(self, denoiser: str) -> None:
        wanted = self._wanted - set(_LOOP_INPUTS)
        given = [name for encoder in self._encoders for name in encoder.names.values()]
        twice = {name for name in wanted if given.count(name) > 1}
        lacking = wanted - set(given)
        if twice:
            raise BundleError("Two encoders give the same condition", got=", ".join(sorted(twice)), do="Export the pipeline again.")
        if lacking:
            raise BundleError(
                f"No encoder gives what the graph '{denoiser}' takes",
                got=", ".join(sorted(lacking)),
                allowed=", ".join(given) or "nothing",
                do="Export the pipeline again.",
            )
