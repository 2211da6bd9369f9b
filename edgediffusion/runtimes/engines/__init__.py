"""The seam to the libraries that run graphs: one file per engine, each a module with the functions below.

    version() -> str                                    the library's version; MissingExtra if it is absent
    suffix: str                                         of a built engine's file
    build(model: Path, engine: Path, *, threads) -> None    make an engine file of an ONNX file
    open_session(file: Path, *, threads) -> Session     load an engine file, or an ONNX file where the library can

An engine may have also

    options: tuple[str, ...]            keyword arguments that its build takes beside threads, of device, precision,
                                        compute_capabilities, shapes, timing_cache, workspace_bytes, progress
    reads_onnx = False                  open_session takes built engines only
    compute_capability() -> str         that of the GPU here; EngineError if there is none. Its engines are for a GPU
    portable: tuple[str, ...]           what engine.json says that need not be the same where engines run
    invalidity(file) -> str             the library's own verdict on an engine file: why it would not load here, or ""
    open_session(..., lean=True)        memory is given back between nodes: for runs within a bound (runtimes/memory.py)
    time_nodes(files, feeds, *, runs, threads) -> list[tuple[NodeTime, ...]]    what each node of a graph takes

A vendor library is imported inside functions only, so naming an engine never loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from edgediffusion.bundle import TensorSpec, axis_size
from edgediffusion.errors import EngineError

NOT_SHARED: Mapping[str, np.ndarray] = MappingProxyType({})


class Binding(Protocol):
    """A session with its buffers fixed to one set of shapes: write ``inputs``, call ``run``, read ``outputs``.

    The arrays stay the same objects for the life of the binding; ``run`` allocates nothing on the Python side.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def run(self) -> None: ...


class Session(Protocol):
    """A loaded engine."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> Binding:
        """Allocate buffers, every named axis at the size given. Axes that the session does not have are ignored.

        A tensor whose name is in ``shared`` has that array for its buffer: what one graph writes there another reads, and
        nothing is copied.
        """
        ...


@dataclass(frozen=True)
class NodeTime:
    """One node as the engine ran it, under the engine's name for it: ``times_ms`` has a value for each run."""

    name: str
    operator: str
    times_ms: tuple[float, ...]


def allocate(specs: Sequence[TensorSpec], axes: Mapping[str, int], shared: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Buffers by name: the shared ones, and zeros for the others.

    Raises:
        EngineError: an axis has no size, or a shared array does not fit its tensor.
    """
    arrays = {}
    for spec in specs:
        array = shared.get(spec.name)
        if array is not None and not _fits(array, spec):
            raise EngineError(
                f"The shared array '{spec.name}' does not fit", got=f"{array.dtype} {array.shape}", allowed=f"{spec.dtype} {spec.shape}"
            )
        arrays[spec.name] = np.zeros(resolve(spec, axes), spec.dtype) if array is None else array
    return arrays


def _fits(array: np.ndarray, spec: TensorSpec) -> bool:
    if array.dtype != spec.dtype or array.ndim != len(spec.shape) or not array.flags.c_contiguous:
        return False
    return all(isinstance(size, str) or size == found for size, found in zip(spec.shape, array.shape, strict=True))


def resolve(spec: TensorSpec, axes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor, every named axis at its size.

    Raises:
        EngineError: an axis has no size.
    """
    sizes = [size if isinstance(size, int) else axis_size(size, axes) for size in spec.shape]
    missing = [str(axis) for axis, size in zip(spec.shape, sizes, strict=True) if size is None]
    if missing:
        raise EngineError(f"The tensor '{spec.name}' has axes of unknown size", got=", ".join(missing), allowed=", ".join(axes) or "none")
    return tuple(size for size in sizes if size is not None)
