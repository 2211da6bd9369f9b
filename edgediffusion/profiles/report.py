"""Measurements as tables, and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgediffusion.profiles import Profile
from edgediffusion.registry import require
from edgediffusion.text import size, table

_GAP, _LABEL = 4, 14


def profile_rows(profile: Profile) -> list[list[str]]:
    """One row a component: milliseconds of a call, of loading, and bytes on disk."""
    return [
        [name, *(f"{v:.2f}" for v in (t.median_ms, t.p90_ms, t.min_ms, t.max_ms, t.load_ms)), size(profile.component_bytes[name])]
        for name, t in profile.components.items()
    ]


def profile_table(profile: Profile) -> str:
    head = ["component", "median ms", "p90 ms", "min ms", "max ms", "load ms", "size"]
    runs = next(iter(profile.components.values())).runs if profile.components else 0
    used = profile.memory
    return "\n".join(
        [
            table(head, profile_rows(profile)),
            "",
            f"one step of the denoiser: {profile.step_ms:.2f} ms (median of {runs} runs)",
            *_cached(profile),
            f"first import to loaded pipeline: {used.load_s:.2f} s",
            f"peak memory of a generation: {size(used.peak_bytes)}, of which Python and NumPy {size(used.before_bytes)}",
            f"bundle: {size(profile.bundle_bytes)}",
            f"machine: {profile.machine}; target: {profile.target or 'the only one built, or the ONNX files'}",
        ]
    )


def _cached(profile: Profile) -> list[str]:
    if profile.cached_step_ms is None:
        return []
    return [f"with --cache {profile.cache}: {profile.cached_step_ms:.2f} ms (mean of a picture's steps)"]


def contact_sheet(rows: Sequence[Sequence[Any]], labels: Sequence[str], captions: Sequence[str], *, zoom: int = 3) -> Any:
    """Rows of Pillow images of one size, a label to the left of each row and a caption under each column.

    Pictures are enlarged ``zoom`` times without smoothing, so that what is seen is what was drawn.
    """
    image = require("PIL.Image", extra="cpu", purpose="Drawing a contact sheet")
    draw = require("PIL.ImageDraw", extra="cpu", purpose="Drawing a contact sheet")
    width, height = (side * zoom for side in rows[0][0].size)
    margin = 8 + max(7 * len(label) for label in labels)
    lines = [_wrapped(caption, width // 6) for caption in captions]
    foot = _LABEL * max(len(line) for line in lines) + _GAP
    sheet = image.new("RGB", (margin + (width + _GAP) * len(captions), (height + _GAP) * len(rows) + foot), "white")
    pen = draw.Draw(sheet)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pen.text((4, y * (height + _GAP) + height // 2 - 6), label, fill="black")
        for x, picture in enumerate(row):
            sheet.paste(picture.convert("RGB").resize((width, height), image.NEAREST), (margin + x * (width + _GAP), y * (height + _GAP)))
    for x, wrapped in enumerate(lines):
        for at, text in enumerate(wrapped):
            pen.text((margin + x * (width + _GAP) + 2, len(rows) * (height + _GAP) + at * _LABEL), text, fill="black")
    return sheet


def _wrapped(text: str, letters: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
