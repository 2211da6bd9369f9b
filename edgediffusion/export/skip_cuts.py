"""Cuts of a UNet: where a resnet of the way up joins the main branch with a skip (DeepCache, Ma et al. 2023, 2312.00858, section 3).

    u_{m+1} ─┐
             ├─ Concat ─ resnet ─ …      the cut ``up_blocks.2.resnets.1``
    h_m ─────┘

The feature, called as the cut, is u_{m+1}: the main branch before it is joined. A shallow graph takes it from an earlier step
and runs what is above: the way down as far as its skips, and the way up from the cut. ``<cut>.indicator`` is the skip h_m,
which is fresh at every step. Of a ControlNet's residuals a shallow graph takes those of its own skips alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch

from edgediffusion.bundle import Component
from edgediffusion.errors import SourceError
from edgediffusion.export.cut_graphs import INDICATOR, part_of, specs
from edgediffusion.export.marks import Mark, argument

DOWN, MID = "down_block_additional_residual_", "mid_block_additional_residual"  # as diffusers calls them, with numbers from 0
_PLACE = re.compile(r"up_blocks\.\d+\.resnets\.\d+")


def places(network: torch.nn.Module) -> tuple[str, ...]:
    return tuple(path for path, _ in network.named_modules() if _PLACE.fullmatch(path))


def marks(network: torch.nn.Module, cuts: Sequence[str]) -> Mapping[str, Mark]:
    """What each resnet is given: the main branch and the skip, joined already."""
    return {f"{cut}.joined": Mark(cut, argument("hidden_states", 0)) for cut in cuts}


def settle(graph: ir.Graph, whole: Component, cuts: Sequence[str]) -> tuple[Component, tuple[Component, ...]]:
    """Let the graph give what meets at each cut, and not what was made of it."""
    joined = {str(value.name): value for value in graph.outputs[len(whole.outputs) :]}
    del graph.outputs[len(whole.outputs) :]
    fed = [spec for spec in whole.inputs if not spec.name.startswith((DOWN, MID))]
    parts = []
    for cut in cuts:
        feature, skip = _branches(joined[f"{cut}.joined"], cut)
        graph.outputs.extend([feature, skip])
        taken, given = specs([feature, skip])
        parts.append(part_of(whole, "denoise.shallow", cut, (*fed, taken), (*whole.outputs, given)))
    return replace(whole, outputs=(*whole.outputs, *specs(graph.outputs[len(whole.outputs) :]))), tuple(parts)


def _branches(joined: ir.Value, cut: str) -> tuple[ir.Value, ir.Value]:
    node = joined.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or joined.shape is None:
        raise SourceError(
            f"The network cannot be cut at '{cut}': nothing is joined there",
            got=None if node is None else node.op_type,
            allowed="a resnet that reads the main branch and a skip, in this order",
            do="Choose another cut.",
        )
    feature, skip = node.inputs
    assert feature is not None
    assert skip is not None
    for value, name in ((feature, cut), (skip, f"{cut}{INDICATOR}")):
        assert value.shape is not None
        value.name, value.shape = name, ir.Shape([joined.shape[0], value.shape[1], *joined.shape[2:]])
    return feature, skip
