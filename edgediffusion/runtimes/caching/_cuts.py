"""The graphs of a policy as it sees them: the whole network, and what a cut makes of it."""

from __future__ import annotations

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import BundleError
from edgediffusion.runtimes.network import Call, Joined


def whole(bundle: Bundle) -> tuple[Component, ...]:
    """The denoisers: the first one, then those that take over below a time step, from high ones to low.

    Raises:
        BundleError: there is not one that starts.
    """
    found = bundle.with_role("denoise")
    first = [component for component in found if component.below is None]
    if len(first) != 1:
        raise BundleError("A pipeline runs one 'denoise' graph from the first step on", got=f"{len(first)} in '{bundle.path}'")
    later = [(component.below, component) for component in found if component.below is not None]
    return (*first, *(component for _, component in sorted(later, key=lambda entry: -entry[0])))


class Whole:
    """A network that was not cut."""

    def __init__(self, graphs: Joined):
        self._graphs = graphs
        (self._first,) = (c.name for c in graphs.components if c.below is None)
        self._later = tuple((c.below, c.name) for c in reversed(graphs.components) if c.below is not None)

    def whole(self, call: Call) -> np.ndarray:
        """Run everything."""
        self._graphs.feed(call)
        self._graphs.observed(call)
        return self._graphs.run(next((name for below, name in self._later if call.timestep < below), self._first))
