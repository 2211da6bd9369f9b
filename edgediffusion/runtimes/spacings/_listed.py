"""Numbers that a caller lists in an option, with / between them: a comma would end the option."""

from __future__ import annotations

import numpy as np

from edgediffusion.errors import ArgumentError


def falling(text: str, what: str) -> np.ndarray:
    """float64 [n], descending and none below 0; empty for an empty text.

    Raises:
        ArgumentError: another text.
    """
    try:
        numbers = np.array([float(part) for part in text.split("/")] if text else [])
    except ValueError:
        numbers = np.array([np.nan])
    if not np.isfinite(numbers).all() or np.any(np.diff(numbers) >= 0) or np.any(numbers < 0):
        raise ArgumentError(f"The {what} cannot be used", got=text, allowed="numbers of 0 and more, from the largest down")
    return numbers


def check_count(listed: np.ndarray, steps: int, what: str) -> None:
    """Refuse a list that has not one number for each step."""
    if len(listed) == steps:
        return
    if not len(listed):
        raise ArgumentError(f"The spacing '{what}' lists none", do=f"List them from the largest down: {what}:at=A/B/C, as many as steps.")
    raise ArgumentError("There is one step for each number of the list", got=f"{steps} steps and {len(listed)} {what}")
