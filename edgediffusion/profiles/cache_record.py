"""What a network's insides do along a picture: every tensor that a caching policy could reuse, at every call.

A ``Recorder`` is a caching policy that caches nothing and writes down. From its notes follow the similarity of any two calls, the
polynomial of TeaCache and the ratios of MagCache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.runtimes.caching._change import relative_change
from edgediffusion.runtimes.caching._cuts import HEAD, TAIL, Blocks, Whole, is_first, whole
from edgediffusion.runtimes.network import PREDICTION, Call, Joined, Network

MODULATED = "modulated input"
_MOST = 1 << 16  # values of a tensor that are kept: mean changes need no more
_DEGREE = 4  # of TeaCache's polynomials, at the most
_POINTS = 10  # for each coefficient that is fitted
_FOLDS = 5


@dataclass
class Recorder:
    """``notes`` has a list for each tensor, of one array for each call of the picture that is being drawn."""

    notes: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        parts = [c for cut in bundle.cuts for c in bundle.with_cut(cut).values() if c.role in (HEAD, TAIL)]
        return tuple(parts) or whole(bundle)

    def start(self, graphs: Joined, calls: int) -> Network:
        self.notes.clear()
        ask = self._transformer(graphs) if graphs.components[0].role == HEAD else self._unet(graphs)

        def noted(call: Call) -> np.ndarray:
            self._note("prediction", ask(call))
            return graphs.arrays[PREDICTION]

        return noted

    def _unet(self, graphs: Joined) -> Network:
        network = Whole(graphs)
        cuts = [spec.name for spec in graphs.components[0].outputs if f"{spec.name}.indicator" in graphs.arrays]

        def ask(call: Call) -> np.ndarray:
            answer = network.whole(call)
            for cut in cuts:
                self._note(cut, graphs.arrays[cut])
            return answer

        return ask

    def _transformer(self, graphs: Joined) -> Network:
        """All cuts, one after the other; the first one last, so that its answer stands."""
        pairs = [Blocks(graphs, graphs.components[at : at + 2]) for at in range(0, len(graphs.components), 2)]
        cuts = [str(component.cut) for component in graphs.components[::2]]

        def ask(call: Call) -> np.ndarray:
            answer = graphs.arrays[PREDICTION]
            for cut, blocks in zip(reversed(cuts), reversed(pairs), strict=True):
                blocks.head(call)
                if is_first(cut):
                    self._note(MODULATED, blocks.indicator)
                answer = blocks.tail(call)
                self._note(cut, blocks.residual)
            return answer

        return ask

    def _note(self, name: str, array: np.ndarray) -> None:
        flat = array.reshape(-1)
        self.notes.setdefault(name, []).append(flat[:: max(1, flat.size // _MOST)].astype(np.float32))


@dataclass(frozen=True)
class Changes:
    """``similarity`` has for each tensor [calls][calls] numbers: the relative change from call j to call i, mean of the pictures.

    ``polynomial`` and ``ratios`` are TeaCache's and MagCache's for the first cut of a transformer, as options; empty elsewhere.
    """

    pictures: int
    similarity: Mapping[str, tuple[tuple[float, ...], ...]]
    polynomial: str
    ratios: str


def watch(draw: Callable[[Recorder, int], object], pictures: int, progress: Callable[[str, float], None]) -> Changes:
    """Draw pictures, ``draw(recorder, i)`` one each, and sum up what their calls have in common."""
    recorder, sums = Recorder(), dict[str, np.ndarray]()
    points: list[tuple[float, float]] = []
    ratios: list[np.ndarray] = []
    for picture in range(pictures):
        progress("watching", picture / pictures)
        draw(recorder, picture)
        for name, arrays in recorder.notes.items():
            found = np.array([[relative_change(a, b) for b in arrays] for a in arrays])
            sums[name] = sums.get(name, 0) + found / pictures
        if MODULATED in recorder.notes:
            cut = next(name for name in recorder.notes if is_first(name))
            points += _steps(recorder.notes[MODULATED], recorder.notes[cut])
            ratios.append(_ratios(recorder.notes[cut]))
    progress("watched", 1.0)
    similarity = {name: tuple(map(tuple, matrix.tolist())) for name, matrix in sums.items()}
    return Changes(pictures, similarity, _polynomial(points), _text(np.mean(ratios, axis=0)) if ratios else "")


def _steps(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """From each call to the next, the relative changes of the input and of what is reused."""
    pairs = zip(inputs[1:], inputs, outputs[1:], outputs, strict=False)
    return [(relative_change(a, b), relative_change(c, d)) for a, b, c, d in pairs]


def _ratios(residuals: Sequence[np.ndarray]) -> np.ndarray:
    """How many times as large each call's residual is as the one before; 1 for the first."""
    sizes = np.array([np.abs(residual).mean(dtype=np.float64) for residual in residuals])
    return np.concatenate([[1.0], sizes[1:] / np.maximum(sizes[:-1], 1e-12)])


def _polynomial(points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return ""
    x, y = np.array([point for point in points if np.isfinite(point).all()]).reshape(-1, 2).T
    degrees = range(1, min(_DEGREE, len(x) // _POINTS) + 1)
    return _text(np.polyfit(x, y, min(degrees, key=lambda degree: _held_out(x, y, degree)))) if degrees else "identity"


def _held_out(x: np.ndarray, y: np.ndarray, degree: int) -> float:
    """The squared error on points that were left out: a high degree follows the points and nothing between them."""
    fold, error = np.arange(len(x)) % _FOLDS, 0.0
    for left_out in range(_FOLDS):
        inside = fold != left_out
        error += float(((np.polyval(np.polyfit(x[inside], y[inside], degree), x[~inside]) - y[~inside]) ** 2).sum())
    return error


def _text(values: np.ndarray) -> str:
    return "/".join(f"{value:.5g}" for value in values)
