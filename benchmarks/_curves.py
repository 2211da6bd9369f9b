"""Curves as a picture, with Pillow alone: points joined by lines, one colour a series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_COLOURS = ("#1f5fbf", "#c8402f", "#2f8f4e", "#8a4fbf", "#c98a1b", "#3aa6a6", "#b0447f", "#6b6b6b", "#20304f", "#7f9f2f", "#d97fc0")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 720, 480, 64, 36, 250, 48
Points = Sequence[tuple[float, float]]


def draw_curves(title: str, series: Mapping[str, Points], *, x_label: str, y_label: str) -> Any:
    """A chart of [(x, y), ...] by name, with a legend at its right."""
    sheet = Image.new("RGB", (_WIDTH + _RIGHT, _HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    (x_ticks, x_range), (y_ticks, y_range) = _ticks(xs), _ticks(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_range[0]) / (x_range[1] - x_range[0]), (y - y_range[0]) / (y_range[1] - y_range[0])
        return _LEFT + across * (_WIDTH - _LEFT - 16), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    for tick in x_ticks:
        pen.line([at(tick, y_range[0]), at(tick, y_range[1])], fill="#e4e4e4")
        pen.text(at(tick, y_range[0]), f"{tick:g}", fill="black", font=font, anchor="ma")
    for tick in y_ticks:
        pen.line([at(x_range[0], tick), at(x_range[1], tick)], fill="#e4e4e4")
        pen.text((_LEFT - 6, at(x_range[0], tick)[1]), f"{tick:g}", fill="black", font=font, anchor="rm")
    pen.text((_LEFT, 10), title, fill="black", font=ImageFont.load_default(15))
    pen.text(((_LEFT + _WIDTH) / 2, _HEIGHT - 8), x_label, fill="black", font=font, anchor="ms")
    pen.text((_LEFT + 6, _TOP + 2), y_label, fill="black", font=font)
    for number, (name, points) in enumerate(series.items()):
        colour, places = _COLOURS[number % len(_COLOURS)], [at(*point) for point in sorted(points)]
        pen.line(places, fill=colour, width=2)
        for x, y in places:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        row = _TOP + 20 * number
        pen.rectangle([_WIDTH + 4, row + 2, _WIDTH + 14, row + 12], fill=colour)
        pen.text((_WIDTH + 20, row), name, fill="black", font=font)
    return sheet


def _ticks(values: Sequence[float]) -> tuple[list[float], tuple[float, float]]:
    """Round numbers about every eighth of the range, and the range that they cover."""
    low, high = min(values), max(values)
    step = next(s for s in (b * 10.0**e for e in range(-4, 6) for b in (1, 2, 5)) if (high - low or 1.0) / s <= 8)
    first, last = floor(low / step), ceil(high / step)
    return [round(n * step, 6) for n in range(first, last + 1)], (first * step, max(last, first + 1) * step)


def stack(charts: Sequence[Any]) -> Any:
    """Charts of one size under each other."""
    sheet = Image.new("RGB", (charts[0].width, sum(chart.height for chart in charts)), "white")
    for number, chart in enumerate(charts):
        sheet.paste(chart, (0, number * charts[0].height))
    return sheet
