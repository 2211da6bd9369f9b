"""A network as a module that takes tensors by the names that its graph's inputs shall have, however many there are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature
from typing import Any

import torch

Call = Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], Any]


class Named(torch.nn.Module):
    """``call(network, tensors)``. torch.export reads the names of a graph's inputs off the signature of ``forward``."""

    def __init__(self, network: torch.nn.Module, names: Iterable[str], call: Call):
        super().__init__()
        self.network = network
        self._arguments = tuple(names), call

        def forward(**tensors: torch.Tensor) -> Any:
            return call(self.network, tensors)

        forward.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in self._arguments[0]])  # type: ignore[attr-defined]
        self.forward = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Named:
        """``forward`` belongs to its instance: copied as it is, it would call the network of the original."""
        return Named(copy.deepcopy(self.network, memo), *self._arguments)
