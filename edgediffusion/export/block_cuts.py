"""Cuts of a transformer: the boundary before one of its blocks.

The cut ``transformer_blocks.3`` lies between the blocks 2 and 3, where the values that go on are the stream of the sample, the
stream of the text, in networks where blocks change it, and what all blocks read, such as the embedding of time. What follows from
the inputs alone is made again by each part. Of a head, a tail and a shallow graph (``cut_graphs``), a cut has each.

``<cut>.indicator``, which a head gives, is what caches look at to know how much a step changed:

1. before the first block, the input of its attention, normalized, scaled and shifted by the time embedding (TeaCache, Liu et
   al. 2024, 2411.19108);
2. elsewhere what the blocks before the cut added to the sample's stream (first-block caching, for the cut before block 1).

A last block that has no stream of text behind it (``context_pre_only``) changes nothing: what is before it is as before any other.
Blocks called ``single_transformer_blocks`` (FLUX.1), which read both streams as one, come behind the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from edgediffusion.bundle import Component
from edgediffusion.export.cut_graphs import CONTEXT, INDICATOR, LAST, RESIDUAL, STREAM, first_block, part_of, specs
from edgediffusion.export.marks import Mark, argument

EMBEDDING = "temb"  # the same before every block: the head of one cut can feed the tail of another
_PLACE = re.compile(r"(single_)?transformer_blocks\.\d+")


@dataclass(frozen=True)
class BlockCuts:
    """How blocks are called, but for the stream of the sample: names and places of arguments.

    ``context`` is the stream of the text, if blocks change it; ``embedding`` what they read of the time, if it is made before them.
    ``attention`` is the module of a block whose first argument is case 1 of the indicator.
    """

    attention: str
    embedding: tuple[str, int] | None
    context: tuple[str, int] | None = None

    def places(self, network: torch.nn.Module) -> tuple[str, ...]:
        return tuple(path for path, _ in network.named_modules() if _PLACE.fullmatch(path))

    def marks(self, network: torch.nn.Module, cuts: Sequence[str]) -> Mapping[str, Mark]:
        """The values that cross each cut, and those that residuals and indicators are made of."""
        first = first_block(cuts[0])
        stream = argument("hidden_states", 0)
        found = {f"{first}{STREAM}": Mark(first, stream)}
        for cut in cuts:
            found[f"{cut}{STREAM}"] = Mark(cut, stream)
            if self.context is not None:
                found[f"{cut}{CONTEXT}"] = Mark(cut, argument(*self.context))
        if first in cuts:
            found[f"{first}{INDICATOR}"] = Mark(f"{first}.{self.attention}", stream)
        if self.embedding is not None:
            found[EMBEDDING] = Mark(first, argument(*self.embedding))
        found[LAST] = Mark("norm_out", stream)
        return found

    def settle(self, graph: ir.Graph, whole: Component, cuts: Sequence[str]) -> tuple[Component, tuple[Component, ...]]:
        """Marked values keep their names and are outputs no longer."""
        known = {spec.name: spec for spec in specs(graph.outputs[len(whole.outputs) :])}
        del graph.outputs[len(whole.outputs) :]
        embedding = (known[EMBEDDING],) if EMBEDDING in known else ()
        parts = []
        for cut in cuts:
            stream = known[f"{cut}{STREAM}"]
            streams = (stream, *(known[name] for name in (f"{cut}{CONTEXT}",) if name in known))
            indicator, residual = (replace(stream, name=f"{cut}{suffix}") for suffix in (INDICATOR, RESIDUAL))
            parts.append(part_of(whole, "denoise.head", cut, whole.inputs, (*streams, *embedding, indicator)))
            parts.append(part_of(whole, "denoise.tail", cut, (*streams, *embedding), (*whole.outputs, residual)))
            parts.append(part_of(whole, "denoise.shallow", cut, (stream, *embedding, residual), whole.outputs))
        return whole, tuple(parts)


STREAMS = BlockCuts(attention="attn", embedding=("temb", 2), context=("encoder_hidden_states", 1))  # Stable Diffusion 3, FLUX.1
CROSS_ATTENTION = BlockCuts(attention="attn1", embedding=("timestep", 4))  # PixArt, Sana: blocks read the text and leave it alone
CLASSES = BlockCuts(attention="attn1", embedding=None)  # DiT: each block embeds time and class itself
