"""The tokenizers of text encoders: as a ``tokenizer.json`` and what a runtime must know beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from edgediffusion.bundle import Tokenizer
from edgediffusion.errors import SourceError
from edgediffusion.export.families import Part
from edgediffusion.export.quiet import quiet
from edgediffusion.export.source import Source

FILE = "tokenizer.json"


def write_tokenizer(source: Source, part: Part, folder: Path) -> Tokenizer:
    """Make sure that the part's tokenizer, copied to a folder of its name in ``folder``, has its ``tokenizer.json``, and describe it.

    Raises:
        SourceError: the tokenizer cannot be read, or has no form that the ``tokenizers`` library knows.
    """
    name, tokens = str(part.tokenizer), part.inputs[0].axes[1]
    tokenizer = _load(source, name)
    file = folder / name / FILE
    if not file.is_file():
        tokenizer.backend_tokenizer.save(str(file))
    if isinstance(tokenizer, transformers.CLIPTokenizer) and not (file.parent / "vocab.json").is_file():
        tokenizer.backend_tokenizer.model.save(str(file.parent))  # the two files that transformers 4 and its users read
    return Tokenizer(
        file=f"{name}/{FILE}",
        length=tokens if isinstance(tokens, int) else tokens.example,
        pad_id=int(tokenizer.pad_token_id),
        lowercase=part.lowercase,
        prefix=part.prefix,
        # SanaPipeline counts two of the prefix's tokens as the text's own: the first one, and one of no reason.
        prefix_tokens=len(tokenizer.encode(part.prefix)) - 2 if part.prefix else 0,
    )


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
