"""What the layers of a network saw: the data that observers gather, and that balance and ranges are found from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgediffusion.errors import ArgumentError


@dataclass
class Channels:
    """Lowest and highest value of each channel, float32 [channels], and the mean of its squares, float64 [channels]."""

    low: np.ndarray
    high: np.ndarray
    squares: np.ndarray
    count: int = 0

    @classmethod
    def none(cls, channels: int) -> Channels:
        return cls(np.full(channels, np.inf, np.float32), np.full(channels, -np.inf, np.float32), np.zeros(channels))

    def add(self, low: np.ndarray, high: np.ndarray, squares: np.ndarray, count: int) -> None:
        """``squares`` is the sum over ``count`` values of each channel."""
        self.low = np.minimum(self.low, low)
        self.high = np.maximum(self.high, high)
        self.squares = self.squares + squares
        self.count += count

    @classmethod
    def merged(cls, parts: Sequence[Channels]) -> Channels:
        whole = cls.none(len(parts[0].low))
        for part in parts:
            whole.add(part.low, part.high, part.squares, part.count)
        return whole

    @property
    def amax(self) -> np.ndarray:
        return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)))

    @property
    def mean_square(self) -> np.ndarray:
        return np.asarray(self.squares / max(self.count, 1))


@dataclass
class Observed:
    """One layer.

    ``read_weight`` gives float32 [out, in, ...], anew each time where the network does not lie in memory; ``steps`` has amax of
    the input's channels for each sampling step.
    """

    read_weight: Callable[[], np.ndarray]
    groups: int
    input: Channels
    output: Channels
    steps: dict[int, np.ndarray] = field(default_factory=dict)
    readers: tuple[str, ...] = ()  # all layers that read the same tensor, this one among them

    @property
    def weight(self) -> np.ndarray:
        return self.read_weight()

    @classmethod
    def merged(cls, parts: Sequence[Observed]) -> Observed:
        """One layer as it was seen in several runs."""
        first = parts[0]
        ends = (Channels.merged([part.input for part in parts]), Channels.merged([part.output for part in parts]))
        whole = cls(first.read_weight, first.groups, *ends, readers=first.readers)
        for part in parts:
            for step, largest in part.steps.items():
                whole.saw(step, largest)
        return whole

    def saw(self, step: int, largest: np.ndarray) -> None:
        """Take note of max|x| [channels] of an input at a sampling step."""
        self.steps[step] = np.maximum(self.steps[step], largest) if step in self.steps else largest


def not_finite(name: str, step: int) -> ArgumentError:
    """The error for a layer that gave a value that is no finite number."""
    return ArgumentError(
        f"The layer '{name}' gives values that are no finite numbers at sampling step {step}",
        got="NaN or infinity",
        do="Check the weights, and the number format they were saved in.",
    )
