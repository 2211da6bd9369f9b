"""Drawing within a bound of memory: what each part of a picture needs, and what is traded for less, in this order.

    1. Stages: encoders are loaded, run and closed before the denoiser is loaded, the decoder after the denoiser is closed.
    2. Memory is given back between the nodes of a graph, where the engine keeps an arena else.
    3. The decoder, and the encoder of pictures, see tiles.
    4. Both rows of classifier-free guidance go through the denoiser one after the other.

1 and 2 change times only: the picture is the same to the bit. What a graph needs is estimated from its file (``work.py``), with
factors that were measured (benchmarks/max_memory.py).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.preflight import sizes_of
from edgediffusion.runtimes.request import Plan
from edgediffusion.runtimes.work import graph_work
from edgediffusion.text import size

# What ONNX Runtime 1.31 was seen to have in memory beyond what the file tells (docs/memory.md): weights are kept in layouts of its kernels
# and some in two, kernels have room of their own, attention more than its scores at a time, and an arena grows by more than is asked for.
_BESIDE, _MOST_BESIDE_BYTES = 0.7, 160 * 10**6  # of weights, and of activations
_OF_SCORES, _OF_ARENA, _OF_SCORES_IN_ARENA = 0.5, 1.3, 0.9
_FIRST_USE_BYTES = 30 * 10**6  # of ONNX Runtime's, the tokenizer's and Pillow's own, when each is first used
_MARGIN = 1.03  # the largest graph that was measured had this much more than the estimate
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_STAGES = {"encode": "encoders", "decode": "decoder", "encode_image": "image encoder"}  # by role; all others are the denoiser's


@dataclass(frozen=True)
class Way:
    """How graphs are loaded: ``staged``, those of one stage at a time; ``lean``, with memory given back between nodes."""

    staged: bool = False
    lean: bool = False


@dataclass(frozen=True)
class Need:
    """Bytes of one graph while it runs: what stays of it in between, and what comes on top."""

    weights: float
    activations: float
    arena: float

    def running(self, way: Way) -> float:
        return self.weights + (self.activations if way.lean else self.arena)

    def idle(self, way: Way) -> float:
        return self.weights + (0 if way.lean else self.arena)


def parse_bytes(given: str | float) -> int:
    """``6GB``, ``5.5 GiB``, ``800MB`` or a number of bytes.

    Raises:
        ArgumentError: it is spelt otherwise, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]i?B|B)?\s*", str(given), re.IGNORECASE)
    count = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if count <= 0:
        raise ArgumentError("An amount of memory cannot be read", got=repr(given), allowed="a number with MB, GB, MiB or GiB, as 6GB")
    return count


class Room:
    """What there is to draw in, and how each picture is made to fit."""

    def __init__(self, bundle: Bundle, limit_bytes: int, components: Callable[[Plan], Sequence[Component]]):
        """``components`` are the graphs that a plan runs. The process as it is at the first picture, before a graph is loaded, is the
        ground that all else comes on top of."""
        self.limit_bytes = limit_bytes
        self._bundle, self._components = bundle, components
        self._ground, self._peak_before = 0, peak_bytes()

    def fit(self, plan: Plan) -> tuple[Plan, Way]:
        """The plan as it fits, with what was traded among its warnings, and the way to load its graphs.

        Raises:
            ArgumentError: nothing makes it fit; the message says what it would take. EngineError: the sizes of a graph cannot be told.
        """
        self._ground = self._ground or resident_bytes() + _FIRST_USE_BYTES
        for way in (Way(), Way(staged=True), Way(staged=True, lean=True)):
            if self._estimate(plan, way) <= self.limit_bytes:
                return replace(plan, warnings=(*plan.warnings, *self._said(plan, plan, way))), way
        least = plan
        for tile in self._tiles(plan):
            if max(self._stage(least, way, "decoder"), self._stage(least, way, "image encoder")) > self.limit_bytes:
                least = replace(plan, tile=tile)
        if self._stage(least, way, "denoiser") > self.limit_bytes and plan.classifier_free and not self._has_fixed_rows():
            least = replace(least, separate=True)
        estimate = self._estimate(least, way)
        if estimate > self.limit_bytes:
            self._refuse(least, way, estimate)
        return replace(least, warnings=(*least.warnings, *self._said(plan, least, way))), way

    def exceeded(self) -> tuple[str, ...]:
        """A warning where the estimate was too low: what this process has really reached."""
        reached = peak_bytes()
        if reached <= max(self.limit_bytes, self._peak_before):
            return ()
        return (f"The bound of {size(self.limit_bytes)} was exceeded: this process has reached {size(reached)}.",)

    def _estimate(self, plan: Plan, way: Way) -> float:
        """Bytes at the peak of a picture."""
        components = self._components(plan)
        if way.staged:
            return max(self._stage(plan, way, stage) for stage in dict.fromkeys(map(stage_of, components)))
        return self._ground + self._together(components, plan, way)

    def _stage(self, plan: Plan, way: Way, stage: str) -> float:
        return self._ground + self._together([c for c in self._components(plan) if stage_of(c) == stage], plan, way)

    def _together(self, components: Sequence[Component], plan: Plan, way: Way) -> float:
        """Of graphs that are loaded at the same time, of which one runs."""
        needs = [self._need(component, plan) for component in components]
        return sum(need.idle(way) for need in needs) + max((need.running(way) - need.idle(way) for need in needs), default=0)

    def _need(self, component: Component, plan: Plan) -> Need:
        assert self._bundle.sampling is not None
        axes = tuple(sorted(sizes_of(component, plan, self._bundle.sampling).items()))
        return need_of(self._bundle.path / component.model, axes)

    def _tiles(self, plan: Plan) -> list[int]:
        """A half and a quarter of the picture's longer side, where those are tiles."""
        assert self._bundle.sampling is not None
        factor = self._bundle.sampling.downsampling
        longer, step = max(plan.latent_shape[2:]) * factor, 4 * factor
        smaller = [longer // part // step * step for part in (2, 4)]
        return [tile for tile in smaller if step <= tile < (plan.tile or longer)]

    def _has_fixed_rows(self) -> bool:
        denoiser = self._bundle.with_role("denoise")[0]
        return any(spec.name == "sample" and isinstance(spec.shape[0], int) for spec in denoiser.inputs)

    def _said(self, asked: Plan, plan: Plan, way: Way) -> tuple[str, ...]:
        traded = [
            *(["graphs are loaded when their turn comes, and closed after it"] if way.staged else []),
            *(["memory is given back after each node"] if way.lean else []),
            *([f"the picture is decoded in tiles of {plan.tile} pixels"] if plan.tile != asked.tile else []),
            *(["the rows of guidance go one after the other"] if plan.separate != asked.separate else []),
        ]
        if not traded:
            return ()
        return (f"For {size(self.limit_bytes)} of memory, {size(self._estimate(plan, way))} by estimate: {'; '.join(traded)}.",)

    def _refuse(self, plan: Plan, way: Way, estimate: float) -> None:
        most = max(self._components(plan), key=lambda c: self._need(c, plan).running(way))
        need = self._need(most, plan)
        raise ArgumentError(
            f"This picture cannot be drawn within {size(self.limit_bytes)}",
            got=f"{size(estimate)} by estimate with all that can be traded, of which weights of '{most.name}' {size(need.weights)}, "
            f"its activations {size(need.activations)}, the rest of this process {size(self._ground)}",
            allowed=f"--max-memory {math.ceil(estimate / 1e6)}MB and more",
            do="Quantize the bundle (int8 has a quarter of float32's weights), or draw a smaller picture or fewer at a time.",
        )


def stage_of(component: Component) -> str:
    return _STAGES.get(component.role, "denoiser")


@lru_cache(maxsize=256)
def need_of(file: Path, axes: tuple[tuple[str, int], ...]) -> Need:
    """What the graph of an ONNX file needs in ONNX Runtime, its named axes at these sizes."""
    work = graph_work(file, dict(axes))
    weights, peak, scores = work.weight_bytes, work.peak_bytes, max((node.scratch_bytes for node in work.nodes), default=0)
    plain = _with_beside(peak) + _OF_SCORES * scores
    arena = max(plain, _OF_ARENA * peak + _OF_SCORES_IN_ARENA * scores)
    return Need(_MARGIN * _with_beside(weights), _MARGIN * plain, _MARGIN * arena)


def _with_beside(count: int) -> float:
    return count + min(_BESIDE * count, _MOST_BESIDE_BYTES)


def resident_bytes() -> int:
    """What this process has in memory now; where only the peak is told, that."""
    return _status("VmRSS") or _largest()


def peak_bytes() -> int:
    """The most that this process ever had in memory."""
    return _status("VmHWM") or _largest()


def _status(key: str) -> int:
    file = Path("/proc/self/status")
    lines: Sequence[str] = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _largest() -> int:
    import resource  # not on Windows, where nothing is told

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
