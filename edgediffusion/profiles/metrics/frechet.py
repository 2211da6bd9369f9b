"""Fréchet distance of the pictures to real ones that were held out, in the judge's features.

As the Fréchet Inception distance (Heusel et al. 2017, 1706.08500, equation 6), with the judge in Inception's place: its
values compare with those of the same judge and nothing else. It falls with the number of pictures, by a term of about
1 / n (Chong and Forsyth 2020, 1911.07023), so it is compared at one number of pictures only.
"""

from __future__ import annotations

import numpy as np

from edgediffusion.profiles.gaussian import centred, frechet, resampled, root
from edgediffusion.profiles.judge import Judge
from edgediffusion.profiles.metrics import LOWER, Seen

UNIT, BETTER, NEEDS = "", LOWER, "real"


def alone(seen: Seen, judge: Judge, counts: np.ndarray) -> np.ndarray:
    assert judge.real is not None  # NEEDS
    real, real_root = judge.real, root(judge.real.covariance)
    return centred(np.array([frechet(real, drawn, root_a=real_root) for drawn in resampled(seen.features, counts)]))
