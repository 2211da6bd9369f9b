"""What a metric says of one set of pictures, with the interval of the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from edgediffusion.profiles.bootstrap import interval
from edgediffusion.profiles.metrics import HIGHER


@dataclass(frozen=True)
class PairScore:
    """How near each picture is to the reference's: the median with its interval, what nine pictures of ten reach, the worst."""

    metric: str
    unit: str
    better: str
    median: float
    low: float
    high: float
    tenth: float
    worst: float


@dataclass(frozen=True)
class SetScore:
    """A figure of all pictures together, the reference's own, and the first divided by the second, each with its interval.

    ``real`` is what real pictures get. None: there is no such figure.
    """

    metric: str
    unit: str
    better: str
    value: float
    low: float
    high: float
    reference: float | None = None
    reference_low: float | None = None
    reference_high: float | None = None
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    real: float | None = None


@dataclass(frozen=True)
class Run:
    """How the pictures of a comparison were drawn; picture i of both bundles from the noise of ``seed`` + i."""

    bundle: str
    reference: str
    prompts: int
    seed: int
    steps: int
    reference_steps: int
    guidance_scale: float
    reference_guidance_scale: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Quality:
    """``judged`` pictures have a prompt that names one class of the judge. ``left_out`` says of a metric why it has no score."""

    pictures: int
    judge: str | None
    judged: int
    resamples: int
    pairs: tuple[PairScore, ...]
    sets: tuple[SetScore, ...]
    left_out: Mapping[str, str]
    run: Run | None = None

    def pair(self, metric: str) -> PairScore:
        """The score of a metric of pairs: ``psnr``, ``ssim``, ``perceptual``. KeyError: it was left out."""
        return {score.metric: score for score in self.pairs}[metric]

    def set(self, metric: str) -> SetScore:
        """The score of a metric of sets: ``agreement``, ``frechet``, ``frechet-to-reference``. KeyError: it was left out."""
        return {score.metric: score for score in self.sets}[metric]


def pair_score(name: str, metric: ModuleType, values: np.ndarray, draws: np.ndarray) -> PairScore:
    """``values`` [n] of the pictures; ``draws`` [resamples, n], which pictures each resample takes."""
    low, high = interval(np.median(values[draws], axis=1))
    tenth, worst = np.percentile(values, (10, 0) if metric.BETTER == HIGHER else (90, 100))
    return PairScore(name, metric.UNIT, metric.BETTER, float(np.median(values)), low, high, float(tenth), float(worst))


def set_score(name: str, metric: ModuleType, values: np.ndarray) -> SetScore:
    """``values`` [1 + resamples], the first being that of the pictures themselves."""
    low, high = interval(values[1:])
    return SetScore(name, metric.UNIT, metric.BETTER, float(values[0]), low, high)


def beside(score: SetScore, values: np.ndarray, own: np.ndarray) -> SetScore:
    """The score with the reference's ``own`` values, from the same resamples, so that what both share falls out of the ratio."""
    low, high = interval(own[1:])
    score = replace(score, reference=float(own[0]), reference_low=low, reference_high=high)
    if not own.all():
        return score  # a ratio to nothing
    ratio = values / own
    low, high = interval(ratio[1:])
    return replace(score, relative=float(ratio[0]), relative_low=low, relative_high=high)
