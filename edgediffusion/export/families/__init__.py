"""Families of pipelines, one file each: a module with what ``Family`` lists.

A family says which graphs the networks of a pipeline become, so that every graph speaks a role of ``bundle.ROLES``,
and the facts that a sampling loop needs. Nothing after export knows families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import onnx_ir as ir
import torch

from edgediffusion.bundle import Component, Sampling
from edgediffusion.errors import SourceError
from edgediffusion.export.marks import Mark
from edgediffusion.export.source import Source
from edgediffusion.registry import find, names

FLOAT = "float"


@dataclass(frozen=True)
class Axis:
    """A free axis: the graph takes any size that is a multiple of ``multiple``.

    ``example`` is a size to trace with; two axes of one graph have different ones, or they would be taken for one. An axis
    that is another one's size times something is ``of`` it: both multiples are then of the same number.
    """

    name: str
    example: int
    multiple: int = 1
    of: str = ""


BATCH = Axis("batch", 2)


@dataclass(frozen=True)
class Tensor:
    """An input or output: its axes are sizes or free; its ``dtype`` is NumPy's name, or ``float`` for what is exported to."""

    name: str
    axes: tuple[int | Axis, ...]
    dtype: str = FLOAT

    @property
    def example(self) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else axis.example for axis in self.axes)


class Cuts(Protocol):
    """How networks of one kind are cut: a module such as ``export.skip_cuts``."""

    def places(self, network: torch.nn.Module) -> tuple[str, ...]:
        """The modules that it can be cut at, in the order in which they run."""

    def marks(self, network: torch.nn.Module, cuts: Sequence[str]) -> Mapping[str, Mark]:
        """The tensors to mark for some of these places, by the names that they have in the graph."""

    def settle(self, graph: ir.Graph, whole: Component, cuts: Sequence[str]) -> tuple[Component, tuple[Component, ...]]:
        """Name what is at the cuts in the traced graph, whose last outputs are the marks, and take away outputs that it shall
        not have; returns its component as it then is, and those to be cut out of it.

        Raises:
            SourceError: the network is not as its modules' names promise.
        """


@dataclass(frozen=True, eq=False)
class Part:
    """One graph to be made.

    ``network`` is the source's component that it is made of, and ``wrap`` puts a module around that network which takes
    ``inputs`` by name and returns ``outputs`` in order. ``tokenizer`` is the folder of the source whose tokenizer
    makes the input ``input_ids``; ``feeds`` as in ``bundle.Component``; ``cuts`` says how its graph can be cut, if it can.
    ``lowercase`` and ``prefix`` are as in ``bundle.Tokenizer``; with a prefix, how many ids there are is a free axis, whose example
    is their number without it.
    """

    name: str
    role: str
    network: str
    wrap: Callable[[torch.nn.Module], torch.nn.Module]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tokenizer: str | None = None
    feeds: Mapping[str, str] = field(default_factory=dict)
    cuts: Cuts | None = None
    lowercase: bool = False
    prefix: str = ""


class Family(Protocol):
    """A file of this folder.

    ``OPTIONAL`` are components that a pipeline of the family may have and that drawing does not need.
    """

    PIPELINES: tuple[str, ...]
    OPTIONAL: tuple[str, ...]

    def parts(self, source: Source) -> tuple[Part, ...]:
        """Raises SourceError: a component is missing or of a class that the family does not know."""

    def sampling(self, source: Source) -> Sampling:
        """Raises SourceError: the scheduler does something that a bundle cannot state."""


def family_of(source: Source) -> tuple[str, Family]:
    """Name and module of the family of a pipeline.

    Raises:
        SourceError: no family knows its class; the message lists those that are known.
    """
    known: dict[str, str] = {}
    for name in names("export.families"):
        module = cast(Family, find("export.families", name))
        if source.class_name in module.PIPELINES:
            return name, module
        known |= dict.fromkeys(module.PIPELINES, name)
    raise SourceError(
        f"Pipelines of the class '{source.class_name}' cannot be exported",
        allowed=", ".join(sorted(known)),
        do="If it is one of these under another name, load it in diffusers as such and save it; otherwise a file for it is "
        "missing in edgediffusion/export/families.",
    )


def check_components(source: Source, used: set[str], optional: tuple[str, ...]) -> None:
    """Refuse a pipeline with components that would be left out although they may change its pictures."""
    surplus = sorted(set(source.components) - used - set(optional))
    if surplus:
        raise SourceError(
            f"This {source.class_name} has components that are not known",
            got=", ".join(f"{name} ({source.components[name]})" for name in surplus),
            allowed=", ".join(sorted(used | set(optional))),
            do="Remove them from the pipeline in diffusers and save it, if it draws without them.",
        )
