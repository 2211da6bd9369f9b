"""A component of the bundle with its loaded engine: shapes in, a binding out, and every binding is made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from edgediffusion.bundle import Bundle, Component, TensorSpec
from edgediffusion.errors import ArgumentError, BundleError, EngineError
from edgediffusion.registry import find
from edgediffusion.runtimes import engine_manifest, preflight
from edgediffusion.runtimes.engines import Binding, Session

_T = TypeVar("_T")
# Buffers of so many sets of shapes are kept for each graph. A picture that is decoded in tiles has four (within, at the right edge, at the
# lower one, in the corner): so two sizes of pictures in turn make none anew, and a service that draws any size does not grow.
KEPT_SHAPES = 8


class Recent(Generic[_T]):
    """What was made for keys, of which the last ``most`` that were asked for are kept."""

    def __init__(self, most: int):
        self._most = most
        self._made: OrderedDict[Hashable, _T] = OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], _T]) -> _T:
        if key not in self._made:
            while len(self._made) >= self._most:  # before the next is made: they need not fit together
                self._made.popitem(last=False)
            self._made[key] = make()
        self._made.move_to_end(key)
        return self._made[key]


class Graph:
    def __init__(self, component: Component, session: Session):
        self.component, self.session = component, session
        self._bindings = Recent[Binding](KEPT_SHAPES)

    @property
    def name(self) -> str:
        return self.component.name

    def input(self, name: str) -> TensorSpec:
        """The spec of an input, as the engine has it.

        Raises:
            BundleError: the graph has no such input.
        """
        for spec in self.session.inputs:
            if spec.name == name:
                return spec
        raise BundleError(f"The graph '{self.name}' has no input '{name}'", got=", ".join(s.name for s in self.session.inputs))

    def bind(self, shapes: Mapping[str, Sequence[int | str]]) -> Binding:
        """The buffers for the given shapes of some inputs and outputs, from which the sizes of the named axes follow.

        Raises:
            ArgumentError: a fixed axis has another size. BundleError: two tensors disagree about an axis.
        """
        key = tuple(sorted(self._axes(shapes).items()))
        return self._bindings(key, lambda: self.session.bind(dict(key)))

    def join(self, shapes: Mapping[str, Sequence[int | str]], shared: Mapping[str, np.ndarray]) -> Binding:
        """New buffers, as ``bind`` makes them, except for the tensors that have an array in ``shared``.

        Raises:
            As ``bind`` does, where shapes and shared arrays do not agree.
        """
        known = {spec.name for spec in (*self.session.inputs, *self.session.outputs)}
        axes = self._axes({**shapes, **{name: array.shape for name, array in shared.items() if name in known}})
        return self.session.bind(axes, shared)

    def _axes(self, shapes: Mapping[str, Sequence[int | str]]) -> dict[str, int]:
        axes: dict[str, int] = {}
        for spec in (*self.session.inputs, *self.session.outputs):
            wanted = shapes.get(spec.name, spec.shape)
            if len(wanted) != len(spec.shape):
                raise ArgumentError(
                    f"The tensor '{spec.name}' of '{self.name}' has another rank", got=tuple(wanted), allowed=str(spec.shape)
                )
            for axis, size in zip(spec.shape, wanted, strict=True):
                if isinstance(axis, int) and size != axis:
                    raise ArgumentError(f"The tensor '{spec.name}' of '{self.name}' is fixed", got=tuple(wanted), allowed=str(spec.shape))
                if isinstance(axis, str) and isinstance(size, int) and axes.setdefault(axis, size) != size:
                    raise BundleError(
                        f"Tensors of the graph '{self.name}' disagree about its axis '{axis}'", got=f"{axes[axis]} and {size}"
                    )
        return axes


def require_finite(array: np.ndarray, name: str, when: str = "") -> None:
    """Refuse what a graph returned if any number of it is not finite.

    Raises:
        EngineError: names the graph, and ``when`` it was run.
    """
    if not np.isfinite(array).all():
        lost = np.count_nonzero(~np.isfinite(array))
        raise EngineError(
            f"The graph '{name}' returned numbers that are not finite{when}",
            got=f"{lost} of {array.size}",
            do="Run it in float32, or calibrate and quantize it again; a checkpoint that overflows in float16 does this too.",
        )


def open_graphs(bundle: Bundle, roles: Sequence[str], *, target: str | None, threads: int | None) -> tuple[Graph, ...]:
    """Load the components that have one of the roles, see ``open_components``."""
    return open_components(bundle, [c for c in bundle.components if c.role in roles], target=target, threads=threads)


def open_components(
    bundle: Bundle, components: Sequence[Component], *, target: str | None, threads: int | None, lean: bool = False
) -> tuple[Graph, ...]:
    """Load components of a bundle: built engines, or the ONNX files by ONNX Runtime. ``lean`` is for engines that have it.

    Raises:
        EngineError, BundleError, ArgumentError: see ``engine_manifest``.
    """
    chosen = engine_manifest.choose(bundle, target)
    if chosen == engine_manifest.ONNX:
        files = {c.name: ("onnxruntime", bundle.path / c.model) for c in components}
    else:
        manifest = engine_manifest.read(bundle, chosen)
        preflight.check(manifest, bundle, chosen)
        files = {c.name: _built_file(bundle, manifest, chosen, c.name) for c in components}
    options = {"lean": True} if lean else {}
    sessions = {
        name: find("runtimes.engines", engine).open_session(file, threads=threads, **options) for name, (engine, file) in files.items()
    }
    return tuple(Graph(c, sessions[c.name]) for c in components)


def _built_file(bundle: Bundle, manifest: engine_manifest.EngineManifest, target: str, name: str) -> tuple[str, Path]:
    """The engine that serves a component, and its file."""
    if name not in manifest.components:
        raise BundleError(
            f"The engines for '{target}' lack the component '{name}'",
            got=", ".join(manifest.components),
            do=engine_manifest.rebuilding(bundle, target),
        )
    return manifest.engine_of(name), bundle.path / engine_manifest.ENGINES / target / manifest.components[name].file
