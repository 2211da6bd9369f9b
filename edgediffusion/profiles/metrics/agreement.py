"""Agreement with the prompt: the part of pictures in which the judge sees the class that the prompt asked for.

Pictures whose prompt asks for none of the judge's classes, or for several, are not counted.
"""

from __future__ import annotations

import numpy as np

from edgediffusion.profiles.judge import Judge
from edgediffusion.profiles.metrics import HIGHER, Seen

UNIT, BETTER, NEEDS = "", HIGHER, "classes"


def alone(seen: Seen, judge: Judge, counts: np.ndarray) -> np.ndarray:
    asked = seen.wanted >= 0
    hits = (seen.chosen == seen.wanted)[asked]
    total = counts[:, asked].sum(1)
    # A resample of pictures of which few are counted may hold none of these: it has nothing to say against the value.
    return np.asarray(np.where(total > 0, counts[:, asked] @ hits / np.maximum(total, 1), hits.mean()))
