"""Fréchet distance of the pictures to the reference's, in the judge's features; see ``frechet`` for what it is.

The noise is the same, so that what the number of pictures adds to both falls out: it is 0 for equal pictures, however few.
A resample takes the same pictures of both.
"""

from __future__ import annotations

import numpy as np

from edgediffusion.profiles.gaussian import centred, frechet, resampled
from edgediffusion.profiles.judge import Judge
from edgediffusion.profiles.metrics import LOWER, Seen

UNIT, BETTER, NEEDS = "", LOWER, "features"


def between(seen: Seen, reference: Seen, judge: Judge, counts: np.ndarray) -> np.ndarray:
    both = zip(resampled(seen.features, counts), resampled(reference.features, counts), strict=True)
    return centred(np.array([frechet(a, b) for a, b in both]))
