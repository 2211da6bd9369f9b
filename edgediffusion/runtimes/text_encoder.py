"""A prompt's way to the conditions of the denoiser: tokenizer, encoder graph, and a cache of what was said before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgediffusion.errors import BundleError
from edgediffusion.runtimes import prompt_weights
from edgediffusion.runtimes.graph import Graph, require_finite
from edgediffusion.runtimes.tokenizers import TextTokenizer, Tokens

CACHED_BYTES = 32 << 20  # of what texts became: about 140 texts of Stable Diffusion's encoder, 8 of a T5 of 4096 x 256


@dataclass(frozen=True)
class Encoded:
    """``conditions`` by the name under which they are fed, each [1, ...]; ``cut`` is the text that did not fit."""

    conditions: Mapping[str, np.ndarray]
    cut: str


class TextEncoder:
    """One ``encode`` component. A text is encoded alone, so what it becomes does not depend on its neighbours.

    What texts became is kept for later pictures, up to ``CACHED_BYTES``; those that were not asked for the longest time go first.
    """

    def __init__(self, graph: Graph, folder: Path, *, wanted: Collection[str] | None = None):
        """``wanted`` are the conditions that anybody takes; the others are not kept. All by default."""
        if graph.component.tokenizer is None:
            raise BundleError(f"The encoder '{graph.name}' has no tokenizer", do="Export the pipeline again.")
        self._wanted = wanted
        self._graph, self._spec = graph, graph.component.tokenizer
        self._tokenize = TextTokenizer(self._spec, folder)
        self._known: dict[tuple[str, bool, bool], Encoded] = {}
        self._kept_bytes = 0

    @property
    def names(self) -> Mapping[str, str]:
        """Name of the condition that each output becomes."""
        feeds = self._graph.component.feeds
        names = {spec.name: feeds.get(spec.name, spec.name) for spec in self._graph.session.outputs}
        return {name: fed for name, fed in names.items() if self._wanted is None or fed in self._wanted}

    @property
    def widths(self) -> Mapping[str, int]:
        """How many numbers a row, or a token, of each condition has, where that is fixed."""
        shapes = {spec.name: spec.shape for spec in self._graph.session.outputs}
        return {fed: width for name, fed in self.names.items() if isinstance(width := shapes[name][-1], int)}

    def __call__(self, text: str, *, weighted: bool = False, negative: bool = False) -> Encoded:
        """What a text becomes; ``weighted`` reads the marks of ``prompt_weights`` in it. ``negative`` says what not to draw.

        Raises:
            EngineError: the graph cannot run, or returned numbers that are not finite.
        """
        key = (text, weighted, negative)
        found = self._known.pop(key, None)
        if found is None:
            found = self._weighted(text, negative) if weighted else self._encode(self._tokenize([text], negative=negative))
            self._kept_bytes += _bytes(found)
        self._known[key] = found  # behind all others: it is the last to go
        while self._kept_bytes > CACHED_BYTES and len(self._known) > 1:
            self._kept_bytes -= _bytes(self._known.pop(next(iter(self._known))))
        return found

    def _encode(self, tokens: Tokens) -> Encoded:
        binding = self._graph.bind({self._spec.input: tokens.ids.shape})
        binding.inputs[self._spec.input][...] = tokens.ids
        binding.run()
        for name in self.names:
            require_finite(binding.outputs[name], self._graph.name)
        return Encoded({fed: binding.outputs[name].copy() for name, fed in self.names.items()}, tokens.cut[0])

    def _weighted(self, text: str, negative: bool) -> Encoded:
        """Outputs that have an entry for each token take the weights; one for the whole text is left as it is."""
        prompt = prompt_weights.parse(text)
        tokens = self._tokenize([prompt.text], negative=negative)
        found, length = self._encode(tokens), self._spec.length
        weights = prompt.of(tokens.spans[0], length)
        if (weights == 1).all():
            return found
        empty = self("", negative=negative).conditions
        conditions = {
            name: prompt_weights.apply(states, empty[name], weights) if states.shape[1:-1] == (length,) else states
            for name, states in found.conditions.items()
        }
        return Encoded(conditions, found.cut)


def _bytes(encoded: Encoded) -> int:
    return sum(array.nbytes for array in encoded.conditions.values())
