"""Any torch module as a bundle of one graph: a robot policy's network of actions, a network that makes pictures larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.utils import _pytree

from edgediffusion import bundle
from edgediffusion.bundle import Component, Sampling, Verb
from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export import Progress
from edgediffusion.export.bfloat16 import speak_float32
from edgediffusion.export.cut_graphs import specs
from edgediffusion.export.group_norm import lower_group_norm
from edgediffusion.export.probe import check_role, largest_difference, run_once
from edgediffusion.export.quiet import quiet
from edgediffusion.export.simplify import simplify
from edgediffusion.export.store import CODES, planned, write_tensors
from edgediffusion.export.weights import CONVERTED

FAMILY, MODEL, BATCH = "module", "model.onnx", "batch"
_TOOLS = ("torch", "onnx-ir", "onnxscript")
_SMALL_BYTES = 256  # of constants that stay in the graph
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest output: some hundred roundings of 2^-23, with much room


@dataclass(frozen=True)
class Interface:
    """How a module's arguments and results are called in the bundle. ``axes`` are free ones, by argument and place."""

    inputs: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    multiples: Mapping[str, int]
    rename: Mapping[str, str]

    def name(self, argument: str) -> str:
        return self.rename.get(argument, argument)

    def free(self, argument: str) -> Mapping[int, str]:
        """The free axes of an argument: those that were named, or the first one."""
        if argument in self.axes:
            return self.axes[argument]
        return {0: BATCH} if self.inputs[argument].dim() else {}


def write_module(
    module: torch.nn.Module,
    interface: Interface,
    folder: Path,
    *,
    role: str,
    name: str,
    sampling: Sampling | None,
    opset: int,
    progress: Progress | None,
) -> None:
    """Fill the empty ``folder``.

    Raises:
        ArgumentError: the role wants other inputs or outputs. SourceError: the module cannot be traced, or its graph computes
        something else.
    """
    _check(module, interface)
    tell = progress or (lambda label, part: None)
    tell(f"exporting {name}", 0.0)
    with _evaluated(module):
        model, expected = _traced(module, interface, opset)
        tensors = _taken(model.graph)
        simplify(model)
        lower_group_norm(model)
        speak_float32(model.graph)
        (folder / name).mkdir()
        _store(model, tensors, folder / name)
    ir.save(model, folder / name / MODEL)
    component = Component(name, role, f"{name}/{MODEL}", specs(model.graph.inputs), specs(model.graph.outputs))
    check_role(component)
    tell(f"checking {name}", 0.8)
    found = run_once(component, folder / name / MODEL, {interface.name(a): _array(t) for a, t in interface.inputs.items()})
    _compare(found, dict(zip(interface.outputs, expected, strict=True)))
    arguments = {"class": type(module).__name__, "role": role, "opset": opset}
    history = (Verb("export-module", arguments, {tool: version(tool) for tool in _TOOLS}),)
    bundle.write(folder, family=FAMILY, components=(component,), sampling=sampling, history=history)
    tell("written", 1.0)


def _check(module: torch.nn.Module, interface: Interface) -> None:
    if not isinstance(module, torch.nn.Module):
        raise ArgumentError("Only a torch module can be exported", got=type(module).__name__, do="Give a torch.nn.Module.")
    for argument, tensor in interface.inputs.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"The example of '{argument}' is no tensor", got=type(tensor).__name__)
        for place, axis in interface.free(argument).items():
            if not 0 <= place < tensor.dim():
                raise ArgumentError(f"'{argument}' has no axis {place}", got=tuple(tensor.shape))
            least = 2 * interface.multiples.get(axis, 1)
            if tensor.shape[place] < least:
                raise ArgumentError(
                    f"The example of '{argument}' is too small along its free axis '{axis}'",
                    got=tuple(tensor.shape),
                    allowed=f"{least} and more: a size of 1 is traced as a fixed one",
                    do=f"Give a longer example, or say that the axis is fixed: axes={{'{argument}': {{}}}}.",
                )
    for what, names in (("axes", interface.axes), ("rename", interface.rename)):
        if unknown := sorted(set(names) - set(interface.inputs)):
            raise ArgumentError(f"'{what}' names arguments without an example", got=", ".join(unknown), allowed=", ".join(interface.inputs))


class _Called(torch.nn.Module):
    """A module with its arguments in order, and what tensors it returns in a tuple, whatever holds them."""

    def __init__(self, network: torch.nn.Module, arguments: Sequence[str]):
        super().__init__()
        self.network, self.arguments = network, tuple(arguments)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        returned = self.network(**dict(zip(self.arguments, tensors, strict=True)))
        return tuple(leaf for leaf in _pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor))


def _traced(module: torch.nn.Module, interface: Interface, opset: int) -> tuple[ir.Model, tuple[torch.Tensor, ...]]:
    called, examples = _Called(module, tuple(interface.inputs)), tuple(interface.inputs.values())
    with quiet(), torch.no_grad():
        try:
            expected = called(*examples)
            exported = torch.export.export(called, examples, dynamic_shapes={"tensors": _dynamic(interface)}, strict=False)
            program = torch.onnx.export(exported, dynamo=True, opset_version=opset, optimize=False, verbose=False)
        except Exception as error:  # the module's code and the exporter raise whatever they like
            raise SourceError(
                f"The module '{type(module).__name__}' cannot be exported: {_root(error)}",
                do="If an axis is a multiple of a number, say so with multiples; if the module's code makes a free axis a plain number, as "
                "len(x) does, take x.shape[0] there, or leave the axis out of axes.",
            ) from error
    if program is None:
        raise SourceError(f"The module '{type(module).__name__}' cannot be exported")
    if len(expected) != len(interface.outputs):
        raise ArgumentError(
            f"The module '{type(module).__name__}' returns {len(expected)} tensors",
            got=f"names for {len(interface.outputs)}: {', '.join(interface.outputs)}",
            do="Name them all with outputs.",
        )
    _name(program.model.graph, interface)
    return program.model, expected


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _dynamic(interface: Interface) -> tuple[dict[int, Any], ...]:
    units: dict[str, Any] = {}
    found = []
    for argument in interface.inputs:
        axes: dict[int, Any] = {}
        for place, axis in interface.free(argument).items():
            multiple = interface.multiples.get(axis, 1)
            unit = units.setdefault(axis, torch.export.Dim(f"{axis}_unit", min=1))
            axes[place] = multiple * unit if multiple > 1 else torch.export.Dim.DYNAMIC
        found.append(axes)
    return tuple(found)


def _name(graph: ir.Graph, interface: Interface) -> None:
    """Names of inputs, outputs and free axes. An output's axis that is no input's is called after it: ``out_sample_2``."""
    known: dict[str, str] = {}
    for value, argument in zip(graph.inputs, interface.inputs, strict=True):
        value.name = interface.name(argument)
        free = interface.free(argument)
        assert value.shape is not None
        for place, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim):
                known[str(size.value)] = free[place]
        value.shape = ir.Shape([free[p] if p in free and isinstance(s, ir.SymbolicDim) else s for p, s in enumerate(value.shape)])
    for value, name in zip(graph.outputs, interface.outputs, strict=True):
        value.name = name
        assert value.shape is not None
        value.shape = ir.Shape(
            [known.get(str(s.value), f"{name}_{p}") if isinstance(s, ir.SymbolicDim) else s for p, s in enumerate(value.shape)]
        )


def _taken(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """The weights under the module's own names, with their values taken out: the optimizer must not look at them."""
    found = {}
    for name, value in list(graph.initializers.items()):
        graph.initializers.pop(name)
        value.name = name.removeprefix("network.")
        graph.initializers[value.name] = value
        if value.const_value is not None and value.const_value.nbytes > _SMALL_BYTES:
            found[value.name], value.const_value = value.const_value, None
    return found


def _store(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol], folder: Path) -> None:
    left = {name: tensor for name, tensor in tensors.items() if name in model.graph.initializers}
    if odd := [name for name, tensor in left.items() if tensor.dtype not in CODES]:
        raise SourceError(f"The weight '{odd[0]}' has a type that no file here has", got=left[odd[0]].dtype.name)
    found = {name: planned(t) for name, t in left.items()}
    for name, at in write_tensors(folder / CONVERTED, found).items() if found else ():
        dtype, shape = left[name].dtype, ir.Shape(at.shape)
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            CONVERTED, at.offset, at.bytes, dtype, shape=shape, name=name, base_dir=str(folder)
        )


def _compare(found: Mapping[str, np.ndarray], expected: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        limit = _TOLERANCE.get(tensor.dtype)
        if limit is None:  # a rounding of a narrower float is as large as what this would find
            continue
        error = largest_difference(found[name], tensor.numpy())
        if not error <= limit:
            raise SourceError(
                f"The graph computes something else than the module: its output '{name}' differs",
                got=f"{error:.2g} of the largest value",
                allowed=f"{limit:g}",
                do="Random numbers and branches that depend on values have no place in a graph; please report any other module.",
            )


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy())


@contextmanager
def _evaluated(module: torch.nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and afterwards as it was."""
    was = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in was.items():
            part.training = training
