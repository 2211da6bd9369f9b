"""Prompts from a file."""

from __future__ import annotations

from collections.abc import Iterable

from edgediffusion.errors import ArgumentError


def read_prompts(file: Iterable[str]) -> tuple[str, ...]:
    """One prompt a line; empty lines are none.

    Raises:
        ArgumentError: a file that is not text, or has no prompt.
    """
    name = getattr(file, "name", "<stdin>")
    try:
        prompts = tuple(filter(None, map(str.strip, file)))
    except UnicodeDecodeError as error:
        raise ArgumentError(f"The file of prompts '{name}' is not UTF-8 text", got=error, do="Save it as UTF-8.") from None
    if not prompts:
        raise ArgumentError(f"The file of prompts '{name}' is empty", do="Write one prompt a line.")
    return prompts
