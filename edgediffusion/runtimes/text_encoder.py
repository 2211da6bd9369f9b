"""A prompt's way to the conditions of the denoiser: tokenizer, encoder graph, and a cache of what was said before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgediffusion.errors import BundleError
from edgediffusion.runtimes.graph import Graph
from edgediffusion.runtimes.tokenizers import TextTokenizer

CACHED_TEXTS = 256


@dataclass(frozen=True)
class Encoded:
    """``conditions`` by the name under which they are fed, each [1, ...]; ``cut`` is the text that did not fit."""

    conditions: Mapping[str, np.ndarray]
    cut: str


class TextEncoder:
    """One ``encode`` component. A text is encoded alone, so what it becomes does not depend on its neighbours."""

    def __init__(self, graph: Graph, folder: Path):
        if graph.component.tokenizer is None:
            raise BundleError(f"The encoder '{graph.name}' has no tokenizer", do="Export the pipeline again.")
        self._graph, self._spec = graph, graph.component.tokenizer
        self._tokenize = TextTokenizer(self._spec, folder)
        self._known: dict[str, Encoded] = {}

    @property
    def names(self) -> Mapping[str, str]:
        """Name of the condition that each output becomes."""
        feeds = self._graph.component.feeds
        return {spec.name: feeds.get(spec.name, spec.name) for spec in self._graph.session.outputs}

    def __call__(self, text: str) -> Encoded:
        if text not in self._known:
            while len(self._known) >= CACHED_TEXTS:
                del self._known[next(iter(self._known))]
            self._known[text] = self._encode(text)
        return self._known[text]

    def _encode(self, text: str) -> Encoded:
        tokens = self._tokenize([text])
        binding = self._graph.bind({self._spec.input: tokens.ids.shape})
        binding.inputs[self._spec.input][...] = tokens.ids
        binding.run()
        return Encoded({fed: binding.outputs[name].copy() for name, fed in self.names.items()}, tokens.cut[0])
