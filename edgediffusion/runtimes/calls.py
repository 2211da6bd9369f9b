"""What happens to a call on its way to the network: further channels beside the sample, and both rows of guidance apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgediffusion.runtimes.network import Call, Network


def with_channels(network: Network, beside: np.ndarray | None) -> Network:
    """A network whose sample has further channels, ``beside``: [images, c', h, w], the same at every call."""
    if beside is None:
        return network

    def ask(call: Call) -> np.ndarray:
        return network(replace(call, sample=np.concatenate([call.sample, beside], axis=1)))

    return ask


def in_halves(first: Network, second: Network) -> Network:
    """A network of which one answers for the first half of the rows and another one for the second.

    An observer of the call is told what each of them is fed, one after the other.
    """

    def ask(call: Call) -> np.ndarray:
        halves = {name: np.split(rows, 2) for name, rows in call.conditions.items()}
        before, after = (replace(call, conditions={name: parts[i] for name, parts in halves.items()}) for i in (0, 1))
        answer = first(before).copy()  # both may write into one buffer
        return np.concatenate([answer, second(after)])

    return ask
