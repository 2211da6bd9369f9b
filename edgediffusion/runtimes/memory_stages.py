"""Graphs that are opened when they run and closed when another stage begins: a session in front of the session.

Buffers are made once and stay the same arrays, whichever session works on them: the engine's seam takes arrays that exist
(``shared``).
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakSet

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError
from edgediffusion.registry import find
from edgediffusion.runtimes import control
from edgediffusion.runtimes.engine_manifest import ONNX, choose, read
from edgediffusion.runtimes.engines import NOT_SHARED, Binding, Session
from edgediffusion.runtimes.graph import Graph, open_components
from edgediffusion.runtimes.memory import Room, Way, parse_bytes, stage_of
from edgediffusion.runtimes.network import Policy
from edgediffusion.runtimes.request import Plan

Open = Callable[[Component, bool], Session]  # a component, and whether memory is given back between nodes


class Stages:
    """The sessions that are open, as ``way`` has it; it may change from picture to picture."""

    def __init__(self, open_session: Open):
        self.way = Way()
        self._open_session = open_session
        self._open: dict[str, tuple[Component, Session, bool]] = {}
        self.bindings: WeakSet[StagedBinding] = WeakSet()

    def session(self, component: Component) -> StagedSession:
        return StagedSession(component, self)

    def opened(self, component: Component) -> Session:
        """The component's session; others are closed first where one stage is open at a time, and all that were opened another way."""
        away = [
            name
            for name, (other, _, lean) in self._open.items()
            if lean != self.way.lean or (self.way.staged and stage_of(other) != stage_of(component))
        ]
        self.close(away)
        if component.name not in self._open:
            self._open[component.name] = (component, self._open_session(component, self.way.lean), self.way.lean)
        return self._open[component.name][1]

    def close(self, names: list[str] | None = None) -> None:
        """Close the sessions of some components, or all, and give their memory back to the system."""
        closing = [name for name in (self._open if names is None else names) if name in self._open]
        if not closing:
            return
        for name in closing:
            del self._open[name]
        for binding in list(self.bindings):
            if binding.component in closing:
                binding.let_go()
        gc.collect()
        _trim()


class StagedSession:
    """What a component says of its tensors, before anything is loaded."""

    def __init__(self, component: Component, stages: Stages):
        self.inputs, self.outputs = component.inputs, component.outputs
        self._component, self._stages = component, stages

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> StagedBinding:
        """Buffers, by the engine's own rules: its session is opened for that. Errors as there."""
        return StagedBinding(self._component, self._stages, axes, self._stages.opened(self._component).bind(axes, shared))


class StagedBinding:
    def __init__(self, component: Component, stages: Stages, axes: Mapping[str, int], binding: Binding):
        self.component = component.name
        self.inputs, self.outputs = binding.inputs, binding.outputs
        self._of, self._stages, self._axes = component, stages, dict(axes)
        self._binding: Binding | None = binding
        stages.bindings.add(self)

    def run(self) -> None:
        session = self._stages.opened(self._of)  # may close others, and this one if it was opened another way
        if self._binding is None:
            self._binding = session.bind(self._axes, {**self.inputs, **self.outputs})
        self._binding.run()

    def let_go(self) -> None:
        """Of the session; the arrays stay."""
        self._binding = None


def _trim() -> None:
    """glibc keeps what is freed for the next time; here another graph's memory is next."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Bounded:
    """A pipeline's graphs within a bound of memory: ``load`` them, ``settle`` each plan before it is drawn."""

    def __init__(self, bundle: Bundle, max_memory: str | float, policy: Policy, *, target: str | None, threads: int | None):
        """
        Raises:
            ArgumentError: the amount cannot be read, or engines of another library would run.
        """
        _check_engines(bundle, target)

        def opened(component: Component, lean: bool) -> Session:
            return open_components(bundle, [component], target=target, threads=threads, lean=lean)[0].session

        def components(plan: Plan) -> tuple[Component, ...]:
            roles = ("encode", "decode", *(("encode_image",) if plan.painting is not None else ()))
            others = tuple(c for c in bundle.components if c.role in roles)
            denoisers = (plan.cache or policy).components(bundle)
            return (*others, *control.components(bundle, denoisers), *denoisers)

        self._stages = Stages(opened)
        self._room = Room(bundle, parse_bytes(max_memory), components)

    def load(self, components: Sequence[Component]) -> tuple[Graph, ...]:
        return tuple(Graph(component, self._stages.session(component)) for component in components)

    def settle(self, plan: Plan) -> Plan:
        """The plan as it fits; graphs are loaded that way from here on. Errors as ``Room.fit``."""
        settled, self._stages.way = self._room.fit(plan)
        return settled

    def exceeded(self) -> tuple[str, ...]:
        return self._room.exceeded()


def _check_engines(bundle: Bundle, target: str | None) -> None:
    chosen = choose(bundle, target)
    find("runtimes.engines", "onnxruntime").version()  # loads the library, so that what it takes is part of the ground
    engines = {"onnxruntime"} if chosen == ONNX else set(read(bundle, chosen).versions())
    if engines != {"onnxruntime"}:
        raise ArgumentError(
            "Memory is bounded for ONNX Runtime on a processor only",
            got=f"engines of {', '.join(sorted(engines))} for '{chosen}'",
            do="Run the ONNX files: --target onnx",
        )
