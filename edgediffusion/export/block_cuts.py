"""Cuts of a transformer: the boundary before one of its blocks.

The cut ``transformer_blocks.3`` lies between the blocks 2 and 3, where the values that go on are the stream of the sample, the
stream of the text and the embedding of time and text. Of a head, a tail and a shallow graph (``cut_graphs``), a cut has each.

``<cut>.indicator``, which a head gives, is what caches look at to know how much a step changed:

1. before the first block, the input of its attention, normalized, scaled and shifted by the time embedding (TeaCache, Liu et
   al. 2024, 2411.19108);
2. elsewhere what the blocks before the cut added to the sample's stream (first-block caching, for the cut before block 1).

A last block that has no stream of text behind it (``context_pre_only``) changes nothing: what is before it is as before any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch

from edgediffusion.bundle import Component
from edgediffusion.export.cut_graphs import CONTEXT, INDICATOR, LAST, RESIDUAL, STREAM, first_block, part_of, specs
from edgediffusion.export.marks import Mark, argument, returned

EMBEDDING = "temb"  # the same before every block: the head of one cut can feed the tail of another
_PLACE = re.compile(r"transformer_blocks\.\d+")


def places(network: torch.nn.Module) -> tuple[str, ...]:
    return tuple(path for path, _ in network.named_modules() if _PLACE.fullmatch(path))


def marks(network: torch.nn.Module, cuts: Sequence[str]) -> Mapping[str, Mark]:
    """The values that cross each cut, and those that residuals and indicators are made of."""
    first = first_block(cuts[0])
    found = {f"{first}{STREAM}": Mark(first, argument("hidden_states", 0))}
    for cut in cuts:
        found[f"{cut}{STREAM}"] = Mark(cut, argument("hidden_states", 0))
        found[f"{cut}{CONTEXT}"] = Mark(cut, argument("encoder_hidden_states", 1))
    if first in cuts:
        found[f"{first}{INDICATOR}"] = Mark(f"{first}.norm1", returned(0))
    found[EMBEDDING] = Mark(first, argument("temb", 2))
    found[LAST] = Mark("norm_out", argument("hidden_states", 0))
    return found


def settle(graph: ir.Graph, whole: Component, cuts: Sequence[str]) -> tuple[Component, tuple[Component, ...]]:
    """Marked values keep their names and are outputs no longer."""
    known = {spec.name: spec for spec in specs(graph.outputs[len(whole.outputs) :])}
    del graph.outputs[len(whole.outputs) :]
    embedding, parts = known[EMBEDDING], []
    for cut in cuts:
        stream, context = known[f"{cut}{STREAM}"], known[f"{cut}{CONTEXT}"]
        indicator, residual = (replace(stream, name=f"{cut}{suffix}") for suffix in (INDICATOR, RESIDUAL))
        parts.append(part_of(whole, "denoise.head", cut, whole.inputs, (stream, context, embedding, indicator)))
        parts.append(part_of(whole, "denoise.tail", cut, (stream, context, embedding), (*whole.outputs, residual)))
        parts.append(part_of(whole, "denoise.shallow", cut, (stream, embedding, residual), whole.outputs))
    return whole, tuple(parts)
