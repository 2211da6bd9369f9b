"""Where calibration items come from: one file per strategy, each with a frozen dataclass ``Strategy``.

    Strategy.allocate(steps, samples, *, seed, features) -> counts

``counts`` is an int array [steps] that sums to ``samples``: how many items to keep at each sampling step, step 0 being
the noisiest. ``features(cut)`` draws one batch and returns what a tensor inside the network was at each step
(``optimize.features``); a strategy that does not call it costs no pass. The fields of the dataclass are the strategy's
options; they are recorded in the quantization state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, ClassVar, Protocol, cast, get_args, get_type_hints

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.registry import find

_WORDS = {int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Features:
    """What one tensor inside the network was at each sampling step, for one batch of trajectories.

    ``values`` is float32 [steps, points, channels]: the points are the rows of the batch, both halves of a guidance
    batch among them, times the places of a picture or the tokens of a sequence. ``cut`` is the path of the module that the
    tensor enters.
    """

    cut: str
    values: np.ndarray
    progress: Callable[[str, float], None] = lambda label, part: None


class Strategy(Protocol):
    """``SKIPS`` says that it passes over steps on purpose, also where there are items for all."""

    SKIPS: ClassVar[bool]

    def allocate(self, steps: int, samples: int, *, seed: int, features: Callable[[str | None], Features]) -> np.ndarray:
        """Counts for each step.

        Raises:
            ArgumentError: the strategy cannot place so few samples on so many steps.
        """


def find_strategy(name: str, options: Mapping[str, object] | None = None) -> Strategy:
    """The strategy ``name`` with its options set; texts, as from a command line, become the type of their option.

    Raises:
        UnknownName: no such strategy. ArgumentError: an option that it does not have, or a value that cannot be used.
    """
    made: Any = find("optimize.calibration", name, kind="strategy").Strategy
    kinds = {f.name: _kind(get_type_hints(made)[f.name]) for f in fields(made)}
    if unknown := sorted(set(options or {}) - set(kinds)):
        known = ", ".join(f"{f.name} ({_WORDS[kinds[f.name]]}, by default {f.default})" for f in fields(made))
        raise ArgumentError(f"The strategy '{name}' has no option '{unknown[0]}'", allowed=known or "none, it has no options")
    return cast(Strategy, made(**{key: _value(name, key, value, kinds[key]) for key, value in (options or {}).items()}))


def check_choice(strategy: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value of an option that is none of ``allowed``."""
    if value not in allowed:
        raise ArgumentError(f"{strategy} has no such {name}", got=repr(value), allowed=", ".join(allowed))


def check_range(strategy: str, name: str, value: float | None, low: float, high: float) -> None:
    """Refuse a value of an option that is not within [low, high]; None, which stands for a default, is."""
    if value is not None and not low <= value <= high:
        raise ArgumentError(f"The option '{name}' of {strategy} cannot be used", got=value, allowed=f"{low:g} to {high:g}")


def spread(samples: int, places: int) -> np.ndarray:
    """``samples`` over ``places`` as evenly as they go: int [places]; what does not divide is spread evenly too."""
    return np.diff(np.arange(places + 1) * samples // places)


def _kind(hint: Any) -> type:
    """The type of an option; ``float | None`` is a float that may be left out."""
    return next((kind for kind in get_args(hint) if kind is not NoneType), hint)  # type: ignore[no-any-return]


def _value(strategy: str, name: str, value: object, kind: type) -> object:
    if isinstance(value, kind) or value is None:
        return value
    try:
        if isinstance(value, str) or (kind is float and isinstance(value, int)):
            return kind(value)
    except ValueError:
        pass
    raise ArgumentError(f"The option '{name}' of {strategy} cannot be used", got=repr(value), allowed=_WORDS[kind])
