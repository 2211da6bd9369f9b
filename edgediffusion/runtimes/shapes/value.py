"""What is known of a value before a graph runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgediffusion.runtimes.onnx_nodes import Node, size_bytes

SMALL = 256  # entries of a value that is carried along as numbers


@dataclass(frozen=True)
class Value:
    """``constant``: it depends on no input of the graph. ``data`` is there where its entries are few and known."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray | None = None
    constant: bool = False

    @property
    def bytes(self) -> int:
        return size_bytes(self.dtype, self.shape)

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


Values = Sequence["Value | None"]
Rule = Callable[[Node, Values], list[Value]]


def at(given: Values, index: int) -> Value:
    value = given[index] if index < len(given) else None
    if value is None:
        raise ValueError(f"it lacks input {index}")
    return value


def numbers(given: Values, index: int) -> list[int] | None:
    """The entries of an input that is a list of whole numbers; None where it is left out.

    Raises:
        ValueError: they are not known before the graph runs.
    """
    value = given[index] if index < len(given) else None
    if value is None:
        return None
    if value.data is None:
        raise ValueError(f"input {index} is only known when it runs")
    return [int(entry) for entry in value.data.ravel()]


def axes_of(node: Node, given: Values, index: int) -> list[int] | None:
    """Axes as an input, or as the attribute that older opsets have."""
    attribute = node.integers("axes")
    return list(attribute) if attribute is not None else numbers(given, index)
