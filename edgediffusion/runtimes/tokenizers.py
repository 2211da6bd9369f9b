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

    ``spans`` has for each text where its tokens begin and end in it; marks that the tokenizer adds have no extent.
    """

    ids: np.ndarray
    cut: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]


class TextTokenizer:
    """transformers' ``tokenizer(texts, padding="max_length", truncation=True, max_length=length)``."""

    def __init__(self, spec: Tokenizer, folder: Path):
        library = require("tokenizers", extra="cpu", purpose="Reading a prompt")
        try:
            self._tokenizer: Any = library.Tokenizer.from_file(str(folder / spec.file))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"The tokenizer '{spec.file}' cannot be read: {error}", do="Make the bundle again.") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=spec.length)
        self._spec = spec

    def __call__(self, texts: Sequence[str]) -> Tokens:
        ids = np.full((len(texts), self._spec.length), self._spec.pad_id, np.int64)
        encodings = self._tokenizer.encode_batch(list(texts))
        for row, encoding in zip(ids, encodings, strict=True):
            row[: len(encoding.ids)] = encoding.ids
        cut = tuple(_cut(text, encoding) for text, encoding in zip(texts, encodings, strict=True))
        return Tokens(ids, cut, tuple(tuple(encoding.offsets) for encoding in encodings))


def _cut(text: str, encoding: Any) -> str:
    """The end of a text that its encoding has no room for, as it was written: decoding would tell it in pieces of words."""
    starts = [start for part in encoding.overflowing for start, end in part.offsets if end > start]  # marks have no extent
    return text[min(starts) :].strip() if starts else ""
