"""Marks: tensors inside a network that its graph shall be cut at. While it is traced they are outputs, and so have names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Pick = Callable[[tuple[Any, ...], Mapping[str, Any], Any], torch.Tensor]  # of a call: arguments, arguments by name, what it returned


@dataclass(frozen=True)
class Mark:
    """What ``pick`` takes of a call of the network's module ``module``, a path."""

    module: str
    pick: Pick


def argument(name: str, place: int) -> Pick:
    """An argument of the call, given by name or in its place."""
    return lambda arguments, named, returned: named[name] if name in named else arguments[place]


def returned(place: int) -> Pick:
    """One of several tensors that the call returned."""
    return lambda arguments, named, returned: returned[place]


@contextmanager
def marked(root: torch.nn.Module, network: torch.nn.Module, marks: Mapping[str, Mark]) -> Iterator[None]:
    """Within the block ``root``, which calls ``network``, returns its one output and the marked tensors in order behind it."""
    found: dict[str, torch.Tensor] = {}

    def record(name: str, mark: Mark) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], returned: Any) -> None:
            found[name] = mark.pick(arguments, named, returned)

        return hook

    hooks = [network.get_submodule(mark.module).register_forward_hook(record(name, mark), with_kwargs=True) for name, mark in marks.items()]
    if marks:
        hooks.append(root.register_forward_hook(lambda module, arguments, output: (output, *(found[name] for name in marks))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
