"""The stochastic similarity filter: the more a frame is like the last one that was drawn, the likelier it is left out.

StreamDiffusion (2312.12491), section 3.4. Drawing lots, instead of a threshold, keeps slow changes from freezing the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def skip_probability(cosine: float, threshold: float) -> float:
    """max(0, 1 - (1 - cosine) / (1 - threshold)): 0 up to the threshold, 1 for equal frames. Equation 9."""
    return 0.0 if threshold >= 1 else max(0.0, 1.0 - (1.0 - cosine) / (1.0 - threshold))


@dataclass
class SimilarityFilter:
    """``skips(frame)`` draws the lot. After more than ``most`` frames left out one passes, alike or not.

    A frame that passes is what later ones are compared with; one that is left out is not, or a slow drift would never be seen. As in
    the authors' code, frames that pass by the lot do not begin the count anew.
    """

    threshold: float = 0.98
    most: int = 10
    seed: int = 0
    _last: np.ndarray | None = field(default=None, repr=False)
    _left_out: int = 0

    def __post_init__(self) -> None:
        self._lots = np.random.Generator(np.random.Philox(key=self.seed))

    def skips(self, frame: np.ndarray) -> bool:
        """Whether to leave out a frame, float [...] of any one shape."""
        flat = frame.astype(np.float64).ravel()
        if self._last is None:
            self._last = flat
            return False
        lot = self._lots.random()
        if skip_probability(_cosine(self._last, flat), self.threshold) >= lot and self._left_out <= self.most:
            self._left_out += 1
            return True
        if self._left_out > self.most:
            self._left_out = 0
        self._last = flat
        return False


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """1 for two black frames: nothing changed."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))
