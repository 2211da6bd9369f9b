"""The network's graphs at run time: which are loaded, the buffers that they share, and one call of the whole.

A denoiser asks a ``Network`` and does not know how many graphs answer. Which ones do is up to a caching policy
(``runtimes/caching``), of which ``none`` runs the whole network at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgediffusion.bundle import Bundle, Component, TensorSpec
from edgediffusion.errors import BundleError
from edgediffusion.runtimes import control
from edgediffusion.runtimes.control import PICTURE, SCALE, Controls
from edgediffusion.runtimes.engines import Binding
from edgediffusion.runtimes.graph import KEPT_SHAPES, Graph, Recent

_KEPT = 2 * KEPT_SHAPES  # a size of pictures may have eight: with and without guidance, its rows apart, and the same aside
PREDICTION = "out_sample"  # what every family's graphs call their prediction

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Call:
    """One call of the network: the ``number``-th of a generation, from 0.

    ``sample`` is float32 [images, ...]; ``conditions`` have [rows, ...] each, where rows are a multiple of images. ``timesteps``
    [images] are given where each image is at one of its own, and ``timestep`` is then that of the first.
    ``observe`` is given what the graphs are fed when the whole network runs for this call; it has to copy what it keeps.
    ``scales`` are those of the ControlNets at this call; in their guess mode, ``unled`` of the first rows are not led.
    """

    number: int
    sample: np.ndarray
    timestep: float
    conditions: Inputs
    observe: Callable[[Inputs], None] | None = None
    scales: tuple[float, ...] = ()
    timesteps: np.ndarray | None = None
    unled: int | None = None


Network = Callable[[Call], np.ndarray]  # -> [rows, ...], the prediction, to be read before the next call


class Policy(Protocol):
    """Which graphs a network runs, and when: see ``runtimes/caching``."""

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        """The components that it runs, each after those that it reads from.

        Raises:
            BundleError: the bundle lacks them.
        """
        ...

    def start(self, graphs: Joined, calls: int) -> Network:
        """The network for one picture of ``calls`` calls. What it remembers lives in it; it has nothing to reuse at first."""
        ...


class Joined:
    """Graphs whose tensors of one name are one array: each is written once, by the loop or by one graph, and read by all."""

    def __init__(self, graphs: Sequence[Graph], shapes: Mapping[str, Sequence[int | str]], controls: Sequence[Graph] = ()):
        """``shapes`` of what the loop feeds; sizes of the other tensors follow, each graph's after those before it.

        ``controls`` are ControlNets, which run before the graphs that take what they give.

        Raises:
            BundleError: a graph reads what neither the loop nor a graph before it gives.
        """
        self.components = tuple(graph.component for graph in graphs)
        self.user: Network | None = None  # whose call ran last
        self.arrays: dict[str, np.ndarray] = {}
        self._bindings: dict[str, Binding] = {}
        scales = {spec.name for graph in controls for spec in graph.session.inputs if spec.name.startswith(SCALE)}
        for graph in (*controls, *graphs):
            lacking = {spec.name for spec in graph.session.inputs} - {"timestep", *scales, *shapes} - set(self.arrays)
            if lacking:
                raise BundleError(f"Nothing gives what the graph '{graph.name}' takes", got=", ".join(sorted(lacking)))
            binding = graph.join(shapes, self.arrays)
            self.arrays.update({**binding.inputs, **binding.outputs})
            self._bindings[graph.name] = binding
        self._controls = Controls([(graph.component, self._bindings[graph.name]) for graph in controls])
        self._cuts = {component.name: component.cut for component in self.components}

    def feed(self, call: Call) -> None:
        # The conditions are written each time, although they do not change: another loop may use the same buffers.
        for name, rows in call.conditions.items():
            self.arrays[name][...] = rows
        timestep = self.arrays["timestep"]
        given = np.array([call.timestep]) if call.timesteps is None else call.timesteps
        timestep.reshape(-1, len(given))[...] = np.round(given) if timestep.dtype.kind in "iu" else given
        self.arrays["sample"].reshape(-1, *call.sample.shape)[...] = call.sample
        self._controls.feed(call)

    def observed(self, call: Call) -> None:
        """Tell the call's observer what was fed."""
        if call.observe is None:
            return
        self._controls.lead(None)
        fed = [name for name in call.conditions if not name.startswith(PICTURE)]
        call.observe({name: self.arrays[name] for name in ("sample", "timestep", *fed, *self._controls.gives)})

    def run(self, name: str) -> np.ndarray:
        """Run a graph; the array that holds the prediction, whether this graph writes it or not."""
        self._controls.lead(self._cuts[name])
        self._bindings[name].run()
        return self.arrays[PREDICTION]

    def named(self, role: str) -> str:
        """The name of the only component that has the role."""
        (name,) = (component.name for component in self.components if component.role == role)
        return name


class Graphs:
    """The denoising graphs of a bundle: each is loaded when a policy first asks for it, and bound once for each set of shapes."""

    def __init__(self, bundle: Bundle, loaded: Iterable[Graph], load: Callable[[Sequence[Component]], Sequence[Graph]]):
        self._bundle, self._load = bundle, load
        self._graphs = {graph.name: graph for graph in loaded}
        self._joined = Recent[Joined](_KEPT)

    def of(self, policy: Policy) -> tuple[Graph, ...]:
        """The graphs that a policy runs, loaded.

        Raises:
            BundleError: the bundle lacks one.
        """
        return self._opened(policy.components(self._bundle))

    def controls(self, policy: Policy) -> tuple[Graph, ...]:
        """The ControlNets that lead these graphs, loaded."""
        return self._opened(control.components(self._bundle, policy.components(self._bundle)))

    def _opened(self, components: Sequence[Component]) -> tuple[Graph, ...]:
        if missing := [c for c in components if c.name not in self._graphs]:
            self._graphs.update({graph.name: graph for graph in self._load(missing)})
        return tuple(self._graphs[c.name] for c in components)

    def inputs(self, policy: Policy) -> tuple[TensorSpec, ...]:
        """What the loop must feed: the inputs that no graph of the policy gives."""
        graphs = (*self.of(policy), *self.controls(policy))
        given = {spec.name for graph in graphs for spec in graph.session.outputs}
        return tuple({spec.name: spec for graph in graphs for spec in graph.session.inputs if spec.name not in given}.values())

    def one_timestep(self, policy: Policy) -> str:
        """Why all rows of a call of the network are at one time step, for a person; empty where each may be at one of its own."""
        graphs = self.of(policy)
        if later := [graph.name for graph in graphs if graph.component.below is not None]:
            return f"the network changes on the way, to {', '.join(later)}"
        for graph in (*graphs, *self.controls(policy)):
            rows, timestep = graph.input("sample").shape[:1], graph.input("timestep").shape
            if timestep != rows or isinstance(rows[0], int):
                return f"the graph '{graph.name}' takes one time step for all rows; edgediffusion export --row-timesteps makes one for each"
        return ""

    def network(self, policy: Policy, shapes: Mapping[str, Sequence[int | str]], calls: int, *, aside: str = "") -> Network:
        """The network for one picture. One that is ``aside`` has buffers of that name, so that the picture's keep what they hold."""
        graphs, controls = self.of(policy), self.controls(policy)
        key = (aside, *(graph.name for graph in graphs), *sorted((name, tuple(shape)) for name, shape in shapes.items()))
        return in_order(policy, self._joined(key, lambda: Joined(graphs, shapes, controls)), calls)


def in_order(policy: Policy, graphs: Joined, calls: int) -> Network:
    """A network that forgets what it kept unless its calls come one after the other, and nobody else's in between.

    A call out of order is one of another trajectory, or others in between had another number of rows: where guidance is off
    for a while, what was kept before is too old. And another loop that uses the same buffers has overwritten it.
    """
    network, expected = policy.start(graphs, calls), 0

    def ask(call: Call) -> np.ndarray:
        nonlocal network, expected
        if call.number != expected or graphs.user is not ask:
            network = policy.start(graphs, calls)
        graphs.user, expected = ask, call.number + 1
        return network(call)

    return ask
