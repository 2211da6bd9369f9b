"""Weights of words in a prompt: ``a (red:1.3) [small] shirt``.

    (text)        times 1.1, and (((text))) times 1.1 three times
    (text:1.3)    times 1.3
    [text]        divided by 1.1
    \\( \\) \\[ \\] \\\\  the characters themselves

The syntax is that of AUTOMATIC1111's web UI (``parse_prompt_attention``), the effect ComfyUI's (``ClipTokenWeightEncoder``): the
state of a token moves away from that of the empty prompt at its place, empty + weight (state - empty). The web UI multiplies the
states themselves and then restores their mean, which is next to nothing where an encoder ends in a normalization.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUND, SQUARE = 1.1, 1 / 1.1
_PIECES = re.compile(r"\\([()\[\]\\])|:\s*([+-]?\d*\.?\d+)\s*\)|([()\[\]])|(.)", re.DOTALL)


@dataclass(frozen=True)
class Weighted:
    """A prompt without its marks, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]

    def of(self, spans: Sequence[tuple[int, int]], length: int) -> np.ndarray:
        """float32 [length]: the weight of each token from where it ends in the text; 1 for those that have no place there."""
        found = np.ones(length, np.float32)
        for i, (start, end) in enumerate(spans[:length]):
            if end > start:
                found[i] = self.weights[end - 1]
        return found


def parse(prompt: str) -> Weighted:
    """Read a prompt with marks. A bracket that is not closed reaches to the end; one that was not opened is text."""
    text: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, weight: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= weight

    def write(piece: str) -> None:
        text.append(piece)
        weights.extend([1.0] * len(piece))

    for found in _PIECES.finditer(prompt):
        escaped, number, bracket, other = found.groups()
        if bracket in opened:
            opened[bracket].append(len(weights))
        elif number is not None and opened["("] and math.isfinite(float(number)):
            close("(", float(number))
        elif bracket == ")" and opened["("]:
            close("(", ROUND)
        elif bracket == "]" and opened["["]:
            close("[", SQUARE)
        else:
            write(escaped or other or found[0])
    for bracket, weight in (("(", ROUND), ("[", SQUARE)):
        while opened[bracket]:
            close(bracket, weight)
    return Weighted("".join(text), tuple(weights))


def apply(states: np.ndarray, empty: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """empty + weights (states - empty), for states [1, tokens, width] and weights [tokens]."""
    moved: np.ndarray = empty + weights[None, :, None] * (states - empty)
    return moved.astype(states.dtype)
