"""Several numbers as the value of one option: "0.5/-1.25e-3/2", since commas part options."""

from __future__ import annotations

import math

from edgediffusion.errors import ArgumentError


def numbers(option: str, text: str, names: str = "") -> tuple[float, ...]:
    """The numbers of a text.

    Raises:
        ArgumentError: one of them is none.
    """
    try:
        found = tuple(float(part) for part in text.split("/"))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        allowed = ", ".join(filter(None, [names, "numbers with slashes between them"]))
        raise ArgumentError(f"The option '{option}' cannot be used", got=repr(text), allowed=allowed)
    return found
