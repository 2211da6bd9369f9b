"""Guidance for a stream: what stands in for the unconditional prediction. StreamDiffusion (2312.12491), section 3.2.

    none        no guidance: a row a step
    full        classifier-free guidance: an unconditional row beside each
    self        residual guidance: the noise that leads from the picture itself to the row's state stands in
    initialize  the same, but a frame's first step has an unconditional row of its own, whose prediction goes on with it

``guidance_scale`` w and the residual's strength ``delta`` as there: e = u + w (c - u), u = delta times the stock noise.
"""

from __future__ import annotations

import numpy as np

KINDS = ("none", "full", "self", "initialize")
RESIDUAL = ("self", "initialize")


def rows(kind: str, steps: int) -> tuple[int, int]:
    """How many unconditional rows a call has, and how many conditional ones; the former come first."""
    return {"none": 0, "self": 0, "initialize": 1, "full": steps}[kind], steps


def fed(kind: str, x: np.ndarray) -> np.ndarray:
    """The rows of a call for the states x, [steps, ...]."""
    return np.concatenate([x[: rows(kind, len(x))[0]], x])


def guided(kind: str, epsilon: np.ndarray, stock: np.ndarray, scale: float, delta: float) -> np.ndarray:
    """The guided noise [steps, ...] from what the network predicts for ``fed``; writes to ``stock`` [steps, ...]."""
    if kind == "none":
        return epsilon
    if kind == "full":
        unconditional, conditional = np.split(epsilon, 2)
    elif kind == "initialize":
        stock[0], conditional = epsilon[0], epsilon[1:]
        unconditional = stock * delta
    else:
        unconditional, conditional = stock * delta, epsilon
    result: np.ndarray = unconditional + scale * (conditional - unconditional)
    return result
