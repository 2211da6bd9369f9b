"""What ``tune-cache`` found, as text, and the changes between steps as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.files import new_file
from edgediffusion.profiles.cache_record import Changes
from edgediffusion.profiles.tune_cache import Outcome, Tuned
from edgediffusion.registry import require
from edgediffusion.text import table

_FORMATS = {".png": "PNG", ".webp": "WEBP"}
_SIDE, _GAP, _TITLE = 240, 16, 16  # pixels


def tuned_text(found: Tuned) -> str:
    head = ["time", "whole calls", "PSNR median", "9 of 10 reach", "worst", "policy"]
    best = [outcome for outcome in found.outcomes if outcome.best]
    lines = [
        table(head, [_row(outcome) for outcome in best]),
        "",
        f"{found.pictures} pictures of {found.steps} calls of the network; time is in parts of the uncached {found.uncached_ms:.1f} ms",
        f"{len(best)} of {len(found.outcomes)} policies: no other one is both faster and nearer to the uncached pictures",
    ]
    if found.chosen is None:
        return "\n".join([*lines, f"No policy is faster with {found.quality_db:g} dB for nine of ten pictures."])
    return "\n".join([*lines, f"--cache {found.chosen}"])


def _row(outcome: Outcome) -> list[str]:
    psnr = (outcome.psnr_db, outcome.psnr_p10_db, outcome.psnr_worst_db)
    return [f"{outcome.time:.2f}", f"{outcome.calls:.2f}", *(f"{value:.1f}" for value in psnr), outcome.policy]


def check_output(output: Path | None) -> None:
    """Refuse a name before any work is done for it.

    Raises:
        ArgumentError: it ends in no picture format. OutputError: the file exists.
    """
    if output is None:
        return
    require("PIL", extra="cpu", purpose="Writing a picture")
    if output.suffix.lower() not in _FORMATS:
        raise ArgumentError(f"'{output}' does not end like a picture", allowed=", ".join(_FORMATS))
    if output.exists():
        raise OutputError(f"The output '{output}' exists already", do="Choose another name, or remove it first.")


def write_changes(changes: Changes, output: Path) -> None:
    """A square for each tensor: row i and column j are as bright as the tensor at call i differs from that at call j."""
    with new_file(output) as partial:
        draw_changes(changes).save(partial, format=_FORMATS[output.suffix.lower()])


def draw_changes(changes: Changes) -> Any:
    """The squares side by side, black for no change and white for the largest one of the square, which is told above it."""
    from PIL import Image, ImageDraw

    squares = list(changes.similarity.items())
    sheet = Image.new("RGB", (len(squares) * (_SIDE + _GAP) + _GAP, _SIDE + _TITLE + 2 * _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, rows) in enumerate(squares):
        matrix, left = np.array(rows), _GAP + number * (_SIDE + _GAP)
        largest = float(matrix[np.isfinite(matrix)].max(initial=0.0))
        shades = np.clip(np.nan_to_num(matrix, posinf=largest) / (largest or 1.0), 0, 1)
        square = Image.fromarray((255 * shades).astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        sheet.paste(square, (left, _TITLE + _GAP))
        pen.text((left, _GAP // 2), f"{name}: 0 to {largest:.2g}", fill="black")
    return sheet
