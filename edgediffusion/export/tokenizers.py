"""The tokenizers of text encoders: as a ``tokenizer.json`` and what a runtime must know beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from edgediffusion.bundle import Tokenizer
from edgediffusion.errors import SourceError
from edgediffusion.export.quiet import quiet
from edgediffusion.export.source import Source

FILE = "tokenizer.json"


def write_tokenizer(source: Source, name: str, folder: Path, length: int) -> Tokenizer:
    """Make sure that the copied tokenizer in ``folder`` / ``name`` has its ``tokenizer.json``, and describe it.

    ``length`` is that of the encoder's input.

    Raises:
        SourceError: the tokenizer cannot be read, or has no form that the ``tokenizers`` library knows.
    """
    tokenizer = _load(source, name)
    file = folder / name / FILE
    if not file.is_file():
        tokenizer.backend_tokenizer.save(str(file))
    if isinstance(tokenizer, transformers.CLIPTokenizer) and not (file.parent / "vocab.json").is_file():
        tokenizer.backend_tokenizer.model.save(str(file.parent))  # the two files that transformers 4 and its users read
    return Tokenizer(file=f"{name}/{FILE}", length=length, pad_id=int(tokenizer.pad_token_id))


def _load(source: Source, name: str) -> Any:
    kind = getattr(transformers, source.components.get(name, ""), transformers.AutoTokenizer)
    try:
        with quiet():
            tokenizer = kind.from_pretrained(source.path / name, local_files_only=True)
            if not tokenizer.is_fast:
                tokenizer = transformers.AutoTokenizer.from_pretrained(source.path / name, local_files_only=True, use_fast=True)
    except Exception as error:  # the library beneath raises nothing narrower
        raise SourceError(f"The tokenizer '{name}' cannot be read: {str(error).splitlines()[0]}", do="Download it again.") from error
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise SourceError(
            f"The tokenizer '{name}' has no {FILE} and no padding token, or none can be made",
            got=type(tokenizer).__name__,
            do="Save it with transformers as a fast tokenizer.",
        )
    return tokenizer
