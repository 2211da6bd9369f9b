"""Metrics: one file each, a module with one function and what a reader must know of its values.

    UNIT: str       "dB", or "" for a plain number
    BETTER: str     "higher" or "lower"
    NEEDS: str      what a judge must have for it: "features", "layers", "classes", "real"; "" if it needs no judge

A metric of pairs compares each picture with the reference's picture of the same prompt and noise:

    pairs(pictures: View, reference: View) -> values [n]

A metric of sets looks at all pictures at once. ``counts`` [rows, n] says how often each picture counts; its first row is
all ones, the others are resamples of the bootstrap. There is a value for each row.

    alone(seen: Seen, judge: Judge, counts) -> values [rows]                     of one set
    between(seen: Seen, reference: Seen, judge: Judge, counts) -> values [rows]  of two sets
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from edgediffusion.registry import find, names

HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class View:
    """Some pictures, and what a judge saw on its way to an answer.

    ``pixels`` is float [n, h, w, c] in 0..1; each of ``layers`` is float32 [n, channels, places].
    """

    pixels: np.ndarray
    layers: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What a judge saw in a whole set of n pictures.

    ``features`` is float32 [n, features], ``chosen`` int [n] the class it takes each picture for, and ``wanted`` int [n] the
    class that the prompt asked for, -1 where it asked for none or for several.
    """

    features: np.ndarray
    chosen: np.ndarray
    wanted: np.ndarray


def of_kind(function: str) -> dict[str, ModuleType]:
    """The metrics, by name, that have the function: ``pairs``, ``alone`` or ``between``."""
    modules = {name: find("profiles.metrics", name) for name in names("profiles.metrics")}
    return {name: module for name, module in modules.items() if hasattr(module, function)}
