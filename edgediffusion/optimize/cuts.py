"""What a pass over the whole denoiser does to a bundle's cut graphs: they are cut out of the new graph again.

So they have its codes and scales in its one file of weights, and a shallow graph that is given what the whole gives is the whole
for quantized graphs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgediffusion.bundle import CUT_ROLES, Bundle, Component
from edgediffusion.errors import ArgumentError


def parts_of(bundle: Bundle, denoisers: Sequence[Component], stages: int = 1) -> tuple[Component, ...]:
    """The components that cuts made of a bundle's only denoiser.

    Raises:
        ArgumentError: there are several denoisers, or will be as many as ``stages``: which of them a feature is from is not known.
    """
    found = tuple(component for component in bundle.components if component.role in CUT_ROLES)
    if found and max(len(denoisers), stages) > 1:
        raise ArgumentError(
            "A denoiser with a graph for each stage of sampling cannot be cut",
            got=f"{max(len(denoisers), stages)} stages, cuts at {', '.join(bundle.cuts)}",
            do="Export without --cut, or set stages = 1 in the recipe and calibrate again.",
        )
    return found


def cut_again(parts: Sequence[Component], components: Sequence[Component], folder: Path) -> list[Component]:
    """Write the graphs of ``parts`` into the new bundle's ``folder``, where the whole graph lies already; ``components`` with them.

    Raises:
        BundleError: the graph has lost a value that it is cut at.
    """
    import onnx_ir as ir

    from edgediffusion.export.cut_graphs import write_part

    if not parts:
        return list(components)
    (file,) = (folder / component.model for component in components if component.role == "denoise")
    whole = ir.load(file)
    written = {part.name: write_part(whole, file.parent, part, folder) for part in parts}
    return [written.get(component.name, component) for component in components]


class Given:
    """What a graph gives besides its prediction, for cuts, which a pass over its layers shall not look at.

    A layer whose output is given to a caller stays float there, and that is for the prediction alone: at a cut the caller is
    the next graph, and takes what the next layer takes.
    """

    def __init__(self, graph: Any):
        self._graph, self._values = graph, list(graph.outputs[1:])
        del graph.outputs[1:]

    def restore(self) -> None:
        """Give it again, read back from its integers where the layers behind it read it so."""
        for value in self._values:
            read = _read_back(value)
            if read is not value:
                value.name, read.name = read.name, value.name
            self._graph.outputs.append(read)


def _read_back(value: Any) -> Any:
    """What Q and DQ make of a value that nothing else reads."""
    found = value
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        uses = list(found.uses())
        if len(uses) != 1 or uses[0].node.op_type != kind:
            return value
        found = uses[0].node.outputs[0]
    return found
