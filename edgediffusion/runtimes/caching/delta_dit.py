"""Delta-DiT for transformers: Chen et al. 2024 (2406.01125). What a range of blocks adds is reused, while the others run.

Rear blocks draw details and front ones outlines, the authors find; so in the first part of the calls, when outlines are
made, the rear blocks are cached, and the front ones after that. Of every ``interval`` calls one computes everything.

    rear    the blocks before the cut run; what those behind it add to the sample's stream is reused
    front   the blocks behind the cut run, on the embeddings plus what those before it added, to the prompt's stream as well

``boundary`` is the part of the calls that comes first. The bundle needs the cut before the first block and the ``cut`` itself, by
default the middle one of those it has behind the first block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import BundleError
from edgediffusion.runtimes.caching._cuts import HEAD, Blocks, blocks, inner_cuts, is_first, refuse_cut, streams
from edgediffusion.runtimes.network import Call, Joined, Network
from edgediffusion.runtimes.options import check_range


@dataclass(frozen=True)
class Policy:
    interval: int = 2
    boundary: float = 0.5
    cut: str = ""

    def __post_init__(self) -> None:
        check_range("interval", self.interval, 1, 1000)
        check_range("boundary", self.boundary, 0, 1)
        if self.cut and is_first(self.cut):
            refuse_cut("delta-dit", self.cut, "cuts behind the first block")

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        inner = inner_cuts(bundle)
        first = [c for c in bundle.with_role(HEAD) if is_first(str(c.cut))]
        if not first:
            raise BundleError(
                "The caching policy 'delta-dit' needs the cut before the first block too",
                got=", ".join(bundle.cuts),
                do="Export the pipeline with both: edgediffusion export SOURCE -o BUNDLE --cut transformer_blocks.0 --cut "
                + (self.cut or inner[len(inner) // 2]),
            )
        return (*first, *blocks(bundle, self.cut or inner[len(inner) // 2]))

    def start(self, graphs: Joined, calls: int) -> Network:
        embeddings = graphs.components[0]
        embedded = streams(graphs, str(embeddings.cut))
        transformer = Blocks(graphs, graphs.components[1:])
        added: list[np.ndarray] | None = None

        def ask(call: Call) -> np.ndarray:
            nonlocal added
            if added is None or call.number % self.interval == 0:
                transformer.head(call)
                graphs.run(embeddings.name)
                added = [later - earlier for later, earlier in zip(transformer.streams, embedded, strict=True)]
                return transformer.tail(call)
            if call.number < self.boundary * calls:
                transformer.head(call)
                return transformer.shallow()
            graphs.feed(call)
            graphs.run(embeddings.name)
            for stream, change, target in zip(embedded, added, transformer.streams, strict=True):
                np.add(stream, change, out=target)
            return transformer.tail(replace(call, observe=None))

        return ask
