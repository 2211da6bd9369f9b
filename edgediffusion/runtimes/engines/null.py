"""Shapes without arithmetic: outputs are zeros. For tests of everything around an engine, with no library installed.

A "graph" is a JSON file: {"inputs": [{"name": ..., "dtype": ..., "shape": [...]}], "outputs": [...]}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import EngineError
from edgediffusion.runtimes.engines import NOT_SHARED, allocate

suffix = ".null.json"


def version() -> str:
    return "1"


def build(model: Path, engine: Path, *, threads: int | None = None) -> None:
    _read(model)
    engine.write_bytes(model.read_bytes())


def open_session(file: Path, *, threads: int | None = None) -> NullSession:
    return NullSession(*_read(file))


class NullSession:
    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]):
        self.inputs, self.outputs = inputs, outputs

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> NullBinding:
        return NullBinding(*(allocate(specs, axes, shared) for specs in (self.inputs, self.outputs)))


class NullBinding:
    def __init__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]):
        self.inputs, self.outputs = inputs, outputs

    def run(self) -> None:
        pass


def _read(file: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        inputs, outputs = (tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in content[k]) for k in ("inputs", "outputs"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"'{file.name}' is no graph of the null engine", got=f"{type(error).__name__}: {error}") from None
    return inputs, outputs
