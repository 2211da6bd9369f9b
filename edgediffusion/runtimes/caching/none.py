"""Nothing is reused: every call runs the whole network."""

from __future__ import annotations

from dataclasses import dataclass

from edgediffusion.bundle import Bundle, Component
from edgediffusion.runtimes.caching._cuts import Whole, whole
from edgediffusion.runtimes.network import Joined, Network


@dataclass(frozen=True)
class Policy:
    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        return whole(bundle)

    def start(self, graphs: Joined, calls: int) -> Network:
        return Whole(graphs).whole
