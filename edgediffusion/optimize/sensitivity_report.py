"""The result of ``sensitivity``: a JSON file, which ``quantize`` takes the layers that stay float from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgediffusion.errors import ArgumentError
from edgediffusion.files import dump_json, new_file
from edgediffusion.optimize.sensitivity_plan import LayerCost, share
from edgediffusion.text import markdown_table, table

FORMAT = 1
_WORST = 10  # layers by error that the text shows


@dataclass(frozen=True)
class Point:
    """One choice of layers. Ratios are of a step to the float graph's; None where it was predicted only.

    ``noise`` is the standard error of ``ratio``.
    """

    float_layers: int
    label: str
    predicted_error: float
    predicted_ratio: float
    error: float | None = None
    ratio: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """``kept`` are the layers that stay float, with the reason; ``layers`` all that the recipe quantizes, in the graph's order.

    ``weights``, ``state``, ``recipe``, ``target`` and ``placement`` say what it holds for; ``bound`` is ``{"error": x}``,
    ``{"latency": x}`` or empty. ``points`` are the Pareto table: the first k layers of the ranking float, for each k, and the
    choice itself. ``notes`` are sentences for a person. ``measurement`` says with which items, engine and processor.
    """

    weights: str
    state: str
    recipe: str
    target: str
    placement: str
    component: str
    kept: Mapping[str, str]
    layers: tuple[LayerCost, ...]
    points: tuple[Point, ...]
    bound: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measurement: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the file; an existing one is refused (OutputError)."""
        with new_file(path) as partial:
            partial.write_text(dump_json({"format": FORMAT, **asdict(self)}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read a report.

        Raises:
            ArgumentError: there is no such file, it is none, or of another format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArgumentError(f"There is no sensitivity report '{path}'", do="Make one with: edgediffusion sensitivity") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ArgumentError(f"'{path}' is no sensitivity report: {error}") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ArgumentError(f"'{path}' is no sensitivity report of the format {FORMAT}", do="Make it again: edgediffusion sensitivity")
        try:
            rows = {
                "layers": tuple(LayerCost(**e) for e in content.pop("layers")),
                "points": tuple(Point(**e) for e in content.pop("points")),
            }
            found = cls(**{**content, **rows, "notes": tuple(content["notes"])})
            if not all(isinstance(reason, str) for reason in found.kept.values()):
                raise TypeError("a reason is no text")
        except (KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"The sensitivity report '{path}' lacks or misstates a field: {error}") from None
        return found

    def check(self, *, weights: str, state: str, recipe: str, target: str, placement: str) -> None:
        """Refuse to serve anything but what it was measured for (ArgumentError)."""
        wanted = {"weights": weights, "state": state, "recipe": recipe, "target": target, "placement": placement}
        words = {name: f"another {name}" for name in wanted} | {"weights": "another model", "state": "another quantization state"}
        differing = [name for name, value in wanted.items() if getattr(self, name) != value]
        if differing:
            name = differing[0]
            raise ArgumentError(
                f"The sensitivity report was made for {words[name]}",
                got=f"{getattr(self, name)}, where {wanted[name]} is quantized",
                do="Make one for this: edgediffusion sensitivity BUNDLE --state STATE -o REPORT",
            )

    def text(self) -> str:
        """For a terminal: the table, the choice with its reasons, and the layers with the largest errors."""
        parts = [table(*_points(self.shown())), *self.notes]
        parts.append(f"{len(self.kept)} of {len(self.layers)} layers stay float" + (":" if self.kept else "."))
        if self.kept:
            parts[-1] += "\n" + table(("layer", "reason"), list(self.kept.items()))
        return "\n\n".join([*parts, table(*_layers(self.worst(), self.layers))])

    def markdown(self) -> str:
        """The Pareto table, for a document."""
        return markdown_table(*_points(self.shown()))

    def shown(self) -> list[Point]:
        """The points that were measured."""
        return [point for point in self.points if point.error is not None]

    def worst(self, count: int = _WORST) -> list[LayerCost]:
        return sorted(self.layers, key=lambda layer: (-layer.error, layer.name))[:count]


def _points(points: Sequence[Point]) -> tuple[tuple[str, ...], list[list[str]]]:
    head = ("float layers", "", "predicted error", "measured error", "predicted step", "measured step")
    rows = []
    for p in points:
        measured = ("-", "-") if p.error is None or p.ratio is None else (f"{p.error:.2%}", f"{p.ratio:.3f} ± {p.noise or 0:.3f}")
        rows.append([str(p.float_layers), p.label, f"{p.predicted_error:.2%}", measured[0], f"{p.predicted_ratio:.3f}", measured[1]])
    return head, rows


def _layers(shown: Sequence[LayerCost], all_layers: Sequence[LayerCost]) -> tuple[tuple[str, ...], list[list[str]]]:
    def us(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.0f}"

    head = ("layer", "error alone", "of all", "float us", "quantized us")
    return head, [[c.name, f"{c.error:.2%}", f"{share(c, all_layers):.0%}", us(c.float_ms), us(c.quantized_ms)] for c in shown]
