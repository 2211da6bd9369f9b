"""A correction in the loop: what it must have been measured for, and its start for one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes import noise as noises
from edgediffusion.runtimes.corrections import Corrector, Deployment, Run, Starts
from edgediffusion.runtimes.corrections._file import Correction, graph_digest, resolve
from edgediffusion.runtimes.denoiser import Denoiser
from edgediffusion.runtimes.guidance import Guidance
from edgediffusion.runtimes.request import Plan

_OTHER_STREAM = 1 << 63  # added to a seed: the noise of a correction is none that a picture starts from


def deployment(bundle: Bundle, plan: Plan) -> Deployment:
    """What a correction must be measured for to serve this plan."""
    made_by = {verb.name: verb.arguments for verb in bundle.history}
    return Deployment(
        model=str(made_by.get("export", {}).get("source", "")),
        graph=graph_digest(bundle),
        state=str(made_by.get("quantize", {}).get("state", "")),
        sampler=plan.sampler_name + (f" with spacing {plan.spacing}" if plan.spacing else ""),
        steps=plan.steps,
        guidance_scale=float(plan.guidance_scale),
    )


def start(correction: Starts | str | Path | None, bundle: Bundle, plan: Plan, denoiser: Denoiser, seed: int | Sequence[int]) -> Corrector:
    """The corrector of one picture; one that does nothing where no correction is asked for.

    Raises:
        ArgumentError: it was measured for something else.
    """
    if correction is None:
        return Corrector()
    starts = resolve(correction)
    if isinstance(starts, Correction):
        _refuse_what_is_not_measured(plan)
    seeds = seed + _OTHER_STREAM if isinstance(seed, int) else [one + _OTHER_STREAM for one in seed]
    noise = noises.source(seeds, plan.images, flavour="philox")
    prediction = denoiser.prediction
    return starts.start(Run(deployment(bundle, plan), prediction, plan.sampler, plan.points, noise, denoiser.predict))


def _refuse_what_is_not_measured(plan: Plan) -> None:
    if plan.guidance != Guidance(plan.guidance_scale):
        raise ArgumentError(
            "A correction is measured with plain guidance at every step, and holds for no other",
            got="guidance_rescale or guidance_interval",
            do="Leave them out, or the correction.",
        )
    if plan.painting is not None or plan.handed_over:
        raise ArgumentError(
            "A correction is measured on pictures that start from noise, and holds for no others",
            got="image",
            do="Leave it out, or the correction.",
        )
