"""What each component of a bundle takes on a target, for one arrangement: a size of picture, formats of numbers, stages, tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from edgediffusion.bundle import Bundle, Component, Sampling
from edgediffusion.errors import ArgumentError
from edgediffusion.profiles.fit_work import floats, narrowed, pieces
from edgediffusion.runtimes.memory import Way, need_of, stage_of
from edgediffusion.runtimes.tiling import OVERLAP
from edgediffusion.runtimes.work import GraphWork, graph_work
from edgediffusion.targets import Target
from edgediffusion.targets import fit as facts
from edgediffusion.targets.fit import Processor

ROLES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Picture:
    """What is drawn: its size in pixels, steps, how many at a time, and whether guidance doubles the rows."""

    height: int
    width: int
    steps: int
    batch: int
    guided: bool


@dataclass(frozen=True)
class Arrangement:
    """``formats`` are those that graphs would be made anew in, by role; ``staged`` is one stage in memory at a time (``run --max-memory``);
    ``tile`` the side in pixels of what the decoder sees at a time."""

    picture: Picture
    staged: bool = False
    formats: Mapping[str, str] = field(default_factory=dict)
    tile: int | None = None


@dataclass(frozen=True)
class ComponentFit:
    """One component: ``calls`` of it make the pictures that are drawn at a time. ``bound`` is what takes most of its time.

    ``activation_bytes`` is the most that is alive at once; ``workspace_bytes`` what the engine's library takes beside weights and that.
    """

    name: str
    role: str
    stage: str
    format: str
    weight_bytes: int
    activation_bytes: int
    workspace_bytes: int
    total_bytes: int
    operations: int
    moved_bytes: int
    seconds: float
    bound: str
    calls: int


class Needs:
    """The components of one bundle on one target. Errors of its methods are those of ``graph_work``."""

    def __init__(self, bundle: Bundle, target: Target, processor: Processor | None):
        """
        Raises:
            ArgumentError: as ``targets.fit.rates``.
        """
        self.target = target
        self._bundle, self._rates = bundle, facts.rates(target, processor)
        self._engine = facts.engine_of(target)
        self.parts = tuple(c for c in bundle.components if c.role in ROLES)

    def components(self, way: Arrangement) -> tuple[ComponentFit, ...]:
        return tuple(self._component(component, way) for component in self.parts)

    def total_bytes(self, parts: tuple[ComponentFit, ...], way: Arrangement) -> int:
        """The whole process: what the engine's library takes, and the largest stage, or all of them."""
        stages: dict[str, int] = {}
        for part in parts:
            stages[part.stage] = stages.get(part.stage, 0) + part.total_bytes
        held = max(stages.values(), default=0) if way.staged else sum(stages.values())
        return facts.idle_bytes(self.target) + held

    def stage_bytes(self, stage: str, way: Arrangement) -> int:
        """The process while one stage is in memory."""
        parts = (self._component(component, way) for component in self.parts if stage_of(component) == stage)
        return facts.idle_bytes(self.target) + sum(part.total_bytes for part in parts)

    def seconds(self, parts: tuple[ComponentFit, ...], way: Arrangement) -> float:
        """Of one picture. Denoisers that share the steps are each as long as all of them are on average."""
        denoisers = sum(part.role == "denoise" for part in parts) or 1
        shares = (part.seconds * part.calls / (denoisers if part.role == "denoise" else 1) for part in parts)
        return sum(shares) / way.picture.batch

    def floats(self, way: Arrangement) -> dict[str, str]:
        """The float format of the graphs, by role; of several of a role, the widest."""
        found: dict[str, str] = {}
        for component in self.parts:
            wide = floats(self._work(component, way))
            found[component.role] = "float32" if "float32" in (wide, found.get(component.role)) else wide
        return found

    def has_float_products(self, way: Arrangement) -> bool:
        """Whether int8 would leave anything of the denoiser smaller."""
        works = [self._work(component, way) for component in self.parts if component.role == "denoise"]
        return any(narrowed(work, "int8").weight_bytes < work.weight_bytes for work in works)

    def _component(self, component: Component, way: Arrangement) -> ComponentFit:
        work = self._work(component, way)
        format = way.formats.get(component.role)
        weights_before = work.weight_bytes
        work = narrowed(work, format) if format else work
        time = facts.estimate(pieces(work, self._engine), self._rates)
        total = self._memory(component, way, work, work.weight_bytes / max(1, weights_before))
        return ComponentFit(
            name=component.name,
            role=component.role,
            stage=stage_of(component),
            format=format or _format(work),
            weight_bytes=work.weight_bytes,
            activation_bytes=work.peak_bytes,
            workspace_bytes=total - work.weight_bytes - work.peak_bytes,
            total_bytes=total,
            operations=work.operations,
            moved_bytes=work.moved_bytes,
            seconds=time.seconds,
            bound=time.bound,
            calls=self._calls(component, way),
        )

    def _memory(self, component: Component, way: Arrangement, work: GraphWork, narrower: float) -> int:
        """By the rule of ``run --max-memory`` where that engine runs; TensorRT keeps activations of each engine for as long as it lives."""
        if self._engine == "tensorrt":
            return work.weight_bytes + work.peak_bytes
        need = need_of(self._bundle.path / component.model, tuple(sorted(self._axes(component, way).items())))
        return round(need.running(Way()) - need.weights * (1 - narrower))

    def _work(self, component: Component, way: Arrangement) -> GraphWork:
        return _counted(self._bundle.path / component.model, tuple(sorted(self._axes(component, way).items())), self._engine != "tensorrt")

    def _axes(self, component: Component, way: Arrangement) -> dict[str, int]:
        """The sizes of the named axes: a prompt and a picture at a time, as the runtime has it, and two rows for guidance."""
        sampling, picture = self._sampling(), way.picture
        height, width = picture.height, picture.width
        if component.role == "decode" and way.tile:
            height, width = min(height, way.tile), min(width, way.tile)
        rows = picture.batch * (2 if picture.guided else 1) if component.role == "denoise" else 1
        latent = {"height": height // sampling.downsampling, "width": width // sampling.downsampling}
        return {"batch": rows, **latent, "image_height": height, "image_width": width}

    def _calls(self, component: Component, way: Arrangement) -> int:
        if component.role == "denoise":
            return way.picture.steps
        if component.role == "encode":
            return way.picture.batch * (2 if way.picture.guided else 1)
        if not way.tile:
            return way.picture.batch
        stride = int(way.tile * (1 - OVERLAP))
        tiles = [1 if side <= way.tile else -(-side // stride) for side in (way.picture.height, way.picture.width)]
        return way.picture.batch * tiles[0] * tiles[1]

    def _sampling(self) -> Sampling:
        if self._bundle.sampling is None:
            raise ArgumentError("The bundle does not say how it is drawn from", do="An estimate takes a bundle of a whole pipeline.")
        return self._bundle.sampling


@cache
def _counted(file: Path, axes: tuple[tuple[str, int], ...], scores: bool) -> GraphWork:
    return graph_work(file, dict(axes), scores=scores)


def _format(work: GraphWork) -> str:
    """What most operations of the products are in."""
    sums: dict[str, int] = {}
    for node in work.nodes:
        if node.format:
            sums[node.format] = sums.get(node.format, 0) + node.operations
    return max(sums, key=lambda name: sums[name], default="")
