"""Caching policies: one file each, with a frozen dataclass ``Policy``; its fields are options (``name:option=value``).

    components(bundle) -> tuple[Component, ...]     the graphs that it runs; BundleError if the bundle lacks them
    start(graphs, calls) -> Network                 the network for one picture of so many calls

Neighbouring steps ask the network nearly the same, so that part of an answer serves again. A policy says when, and what is
done instead. It counts calls of the network and never looks at time steps: a sampler may ask twice at one time step. What
it remembers lives in the closure that ``start`` returns. The first call of that closure has nothing to reuse and computes
everything; a gap in the numbers of calls starts it anew (``runtimes/network.py``).

What a policy can reuse depends on where the bundle's network was cut at export (``edgediffusion export --cut``): ``_cuts.py``.
"""

from __future__ import annotations

from typing import cast

from edgediffusion.runtimes.network import Policy
from edgediffusion.runtimes.options import choose

REGISTRY = "runtimes.caching"


def resolve(cache: str | Policy | None) -> Policy:
    """A policy from ``name`` or ``name:option=value,option=value``; None is ``none``, and a policy is returned as it is.

    Raises:
        UnknownName: no such policy. ArgumentError: an option that it does not have, or a value that it refuses.
    """
    if cache is None or isinstance(cache, str):
        return cast(Policy, choose(REGISTRY, cache or "none", kind="caching policy", made="Policy").options)
    return cache
