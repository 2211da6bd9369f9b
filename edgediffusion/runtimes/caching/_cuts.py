"""The graphs of a policy as it sees them: the whole network, and what a cut makes of it (docs/caching.md, "Cuts")."""

from __future__ import annotations

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.runtimes.network import Call, Joined

HEAD, TAIL, SHALLOW = "denoise.head", "denoise.tail", "denoise.shallow"


# --- which components they are


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


def skip(bundle: Bundle, cut: str) -> tuple[Component, ...]:
    """What ``Skip`` runs: the whole network, and the part outside of a cut; by default of the outermost one, the last.

    Raises:
        BundleError: no such cut, or none of a network with skips.
    """
    _refuse_stages(bundle)
    parts = _parts(bundle, cut or (bundle.cuts[-1] if bundle.cuts else ""), has=SHALLOW, lacks=HEAD)
    return (*whole(bundle), parts[SHALLOW])


def blocks(bundle: Bundle, cut: str) -> tuple[Component, ...]:
    """What ``Blocks`` runs: the network before a cut, behind it, and its output layers alone; by default of the first cut.

    Raises:
        BundleError: no such cut, or none of a transformer.
    """
    _refuse_stages(bundle)
    parts = _parts(bundle, cut or (bundle.cuts[0] if bundle.cuts else ""), has=HEAD, lacks="")
    return (parts[HEAD], parts[TAIL], parts[SHALLOW])


def inner_cuts(bundle: Bundle) -> tuple[str, ...]:
    """The cuts behind at least one block of a transformer.

    Raises:
        BundleError: there are none.
    """
    found = tuple(cut for cut in bundle.cuts if not is_first(cut))
    if not found:
        raise BundleError(
            "This caching policy needs a cut behind the first block",
            got=", ".join(bundle.cuts) or "a bundle without cuts",
            do="Export the pipeline with one: edgediffusion export SOURCE -o BUNDLE --cut transformer_blocks.1",
        )
    return found


def is_first(cut: str) -> bool:
    """Whether a transformer was cut before its first block."""
    return cut.rpartition(".")[2] == "0" and not cut.startswith("single_")


def refuse_cut(policy: str, cut: str, allowed: str) -> None:
    raise ArgumentError(f"The caching policy '{policy}' does not work at the cut '{cut}'", allowed=allowed)


def _parts(bundle: Bundle, cut: str, *, has: str, lacks: str) -> dict[str, Component]:
    if not cut:
        raise BundleError(
            f"The bundle '{bundle.path}' has no cuts, which this caching policy needs",
            do="Export the pipeline with one, edgediffusion export SOURCE -o BUNDLE --cut MODULE; docs/caching.md says which.",
        )
    parts = bundle.with_cut(cut)
    if has not in parts or lacks in parts:
        kind = "a transformer, cut before a block" if HEAD in parts else "a UNet, cut where skips join"
        raise BundleError(
            "This caching policy is made for another kind of network",
            got=f"{kind}: {cut}",
            do="docs/caching.md has a table of what fits which.",
        )
    return parts


def _refuse_stages(bundle: Bundle) -> None:
    if later := whole(bundle)[1:]:
        raise BundleError(
            "This caching policy runs one network from the first step to the last",
            got=f"a bundle that changes it on the way: {', '.join(c.name for c in later)}",
            do="Quantize with stages = 1, or take adaptive-diffusion, which reuses whole predictions.",
        )


# --- what they do


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


class Skip:
    """A UNet and a cut of its up path: the feature that enters there is kept by the whole and read by the shallow graph."""

    def __init__(self, graphs: Joined):
        self._graphs = graphs
        self._whole, self._shallow = (component.name for component in graphs.components)
        self.indicator = graphs.arrays[f"{graphs.components[1].cut}.indicator"]  # the skip beside the feature, of the last run

    def whole(self, call: Call) -> np.ndarray:
        """Run everything; the feature is kept."""
        self._graphs.feed(call)
        self._graphs.observed(call)
        return self._graphs.run(self._whole)

    def shallow(self, call: Call) -> np.ndarray:
        """Run the outermost levels around the feature that was kept last."""
        self._graphs.feed(call)
        return self._graphs.run(self._shallow)


def streams(graphs: Joined, cut: str) -> tuple[np.ndarray, ...]:
    """What the blocks of a transformer change, at a cut: the stream of the sample, and that of the text if it has one."""
    names = (f"{cut}.hidden_states", f"{cut}.encoder_hidden_states")
    return tuple(graphs.arrays[name] for name in names if name in graphs.arrays)


class Blocks:
    """A transformer and a cut before one of its blocks. The residual is what the blocks behind the cut add to its stream.

    ``indicator`` and ``residual`` are the graphs' own buffers, float [rows, tokens, width]: the head writes the former, the
    tail the latter, and a policy may write a residual of its own for the shallow graph. ``streams`` are all that blocks change.
    """

    def __init__(self, graphs: Joined, components: tuple[Component, ...] | None = None):
        self._graphs = graphs
        self._names = {c.role: c.name for c in components or graphs.components}
        cut = (components or graphs.components)[0].cut
        self.streams = streams(graphs, str(cut))
        self.indicator, self.residual = graphs.arrays[f"{cut}.indicator"], graphs.arrays[f"{cut}.residual"]

    def head(self, call: Call) -> None:
        """Run what is before the cut."""
        self._graphs.feed(call)
        self._graphs.run(self._names[HEAD])

    def tail(self, call: Call) -> np.ndarray:
        """Run what is behind the cut, after ``head`` for the same call; the residual is kept."""
        self._graphs.observed(call)
        return self._graphs.run(self._names[TAIL])

    def shallow(self) -> np.ndarray:
        """Run the output layers on the stream at the cut and the residual."""
        return self._graphs.run(self._names[SHALLOW])
