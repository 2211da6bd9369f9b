"""Text to token ids with the ``tokenizers`` library, as transformers' fast tokenizers do it: cut and padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Tokenizer
from edgediffusion.errors import BundleError
from edgediffusion.registry import require


@dataclass(frozen=True)
class Tokens:
    """``ids`` is int64 [batch, length]; ``cut`` has for each text what did not fit, an empty string where all did.

    ``spans`` has for each text where its tokens begin and end in it; marks that the tokenizer adds have no extent. Tokens whose
    states the graph leaves out, those of a prefix, have none.
    """

    ids: np.ndarray
    cut: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]


class TextTokenizer:
    """transformers' ``tokenizer(texts, padding="max_length", truncation=True, max_length=length)``, padded on the right."""

    def __init__(self, spec: Tokenizer, folder: Path):
        library = require("tokenizers", extra="cpu", purpose="Reading a prompt")
        try:
            self._tokenizer: Any = library.Tokenizer.from_file(str(folder / spec.file))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"The tokenizer '{spec.file}' cannot be read: {error}", do="Make the bundle again.") from None
        self._tokenizer.no_padding()
        self._spec = spec

    def __call__(self, texts: Sequence[str], *, negative: bool = False) -> Tokens:
        """``negative`` texts go without the tokenizer's prefix, and so have fewer ids."""
        prefix, further = ("", 0) if negative else (self._spec.prefix, self._spec.prefix_tokens)
        length = self._spec.length + further
        self._tokenizer.enable_truncation(max_length=length)
        ids = np.full((len(texts), length), self._spec.pad_id, np.int64)
        encodings = self._tokenizer.encode_batch([prefix + self._plain(text) for text in texts])
        spans, cut = [], []
        for text, row, encoding in zip(texts, ids, encodings, strict=True):
            row[: len(encoding.ids)] = encoding.ids
            moved = len(prefix) - (len(text) - len(text.lstrip()) if self._spec.lowercase else 0)
            own = [_within(text, span, moved) if span[1] > len(prefix) else (0, 0) for span in encoding.offsets]
            spans.append((*own[:1], *own[1 + further :]))
            cut.append(_cut(text, encoding, moved))
        return Tokens(ids, tuple(cut), tuple(spans))

    def _plain(self, text: str) -> str:
        return text.lower().strip() if self._spec.lowercase else text


def _within(text: str, span: tuple[int, int], moved: int) -> tuple[int, int]:
    """A span in the text that the tokenizer read, ``moved`` characters longer in front, as one in the text as it was written."""
    start, end = (min(max(place - moved, 0), len(text)) for place in span)
    return start, end


def _cut(text: str, encoding: Any, moved: int) -> str:
    """The end of a text that its encoding has no room for, as it was written: decoding would tell it in pieces of words."""
    starts = [start for part in encoding.overflowing for start, end in part.offsets if end > start]  # marks have no extent
    return text[max(min(starts) - moved, 0) :].strip() if starts else ""
