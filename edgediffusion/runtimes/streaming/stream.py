"""A stream around a bundle: pictures of a camera or a game in, drawn pictures out, one call of the network each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.runtimes import noise as noises
from edgediffusion.runtimes.engines import Binding
from edgediffusion.runtimes.graph import Graph, require_finite
from edgediffusion.runtimes.images import to_input
from edgediffusion.runtimes.loop import since
from edgediffusion.runtimes.samplers.lcm import SOLVER_STEPS
from edgediffusion.runtimes.schedules import check_steps
from edgediffusion.runtimes.streaming import residual
from edgediffusion.runtimes.streaming.batch import Predict, StreamBatch
from edgediffusion.runtimes.streaming.filter import SimilarityFilter

if TYPE_CHECKING:
    from edgediffusion.runtimes.pipeline import Pipeline

STEPS, STRENGTH = 2, 0.5


@dataclass(frozen=True)
class Frame:
    """What comes out for a frame: the picture of the ``index``-th frame that went in, float32 [height, width, channels] in 0..1.

    ``repeated`` says that it is the last one once more, since the frame that went in now was like the one before.
    """

    index: int
    pixels: np.ndarray
    repeated: bool
    elapsed_ms: float


class Stream:
    """Call it with a frame: the picture that is done, or None while the first frames are on their way. ``drain`` gives the last ones.

    Memory is steady: the network's buffers are bound once, and of pictures the last one is kept.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int = STEPS,
        strength: float = STRENGTH,
        guidance: str = "none",
        guidance_scale: float | None = None,
        delta: float = 1.0,
        similarity: SimilarityFilter | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
    ):
        """``steps`` are those of a consistency model, taken from the last ``strength`` of its solver's; each has a row of the batch.

        ``guidance`` is one of ``residual.KINDS``, with ``guidance_scale`` and ``delta``; a network with embedded guidance takes the
        scale as a condition, and none of them. ``similarity`` leaves out frames that are like the last one.

        Raises:
            ArgumentError: a value that cannot be used. BundleError: the bundle's graphs cannot be streamed.
        """
        facts = pipeline.sampling
        timesteps = stream_timesteps(facts.schedule, steps, strength)
        options: dict[str, Any] = {"timesteps": timesteps, "sampler": "lcm", "seed": seed, "height": height, "width": width}
        if facts.guidance == "embedded":
            options["guidance_scale"] = guidance_scale
        elif facts.guidance == "classifier-free":
            options |= {"guidance_scale": 2.0, "negative_prompt": negative_prompt}  # any above 1: both rows are encoded
        prepared = pipeline.prepared(prompt, **options)
        _check_guidance(guidance, facts.guidance)
        shape = prepared.plan.latent_shape[1:]
        noise = noises.source(seed, 1, flavour="torch", dtype="float32").normal((steps, *shape))
        rows = residual.rows(guidance, steps)
        self._batch = StreamBatch(
            prepared.plan.points.at,
            noise,
            _predict(prepared.graph, _rows(prepared.conditions, rows), (sum(rows), *shape)),
            facts.prediction,
            guidance,
            facts.guidance_scale if guidance_scale is None else guidance_scale,
            delta,
        )
        self._autoencoder, self._filter = prepared.autoencoder, similarity
        self._size = (shape[1] * facts.downsampling, shape[2] * facts.downsampling)
        self._under_way: deque[int] = deque()
        self._entered = 0
        self._shown: Frame | None = None
        self._latent: np.ndarray | None = None

    def __call__(self, picture: Any) -> Frame | None:
        """``picture`` as for ``Request.image``; one of another size is resized.

        Raises:
            ArgumentError: no picture. EngineError: a graph returned numbers that are not finite.
        """
        started = time.perf_counter()
        pixels = to_input([picture], self._autoencoder.channels, *self._size)
        index, self._entered = self._entered, self._entered + 1
        if self._filter is not None and self._shown is not None and self._filter.skips(pixels):
            return Frame(self._shown.index, self._shown.pixels, True, since(started))
        self._latent = self._autoencoder.encode(pixels).mean
        self._under_way.append(index)
        return self._step(started)

    def drain(self) -> Iterator[Frame]:
        """The pictures that are still under way; the stream then goes on with the next frame as if it were its first."""
        while self._under_way:
            frame = self._step(time.perf_counter())
            if frame is not None:
                yield frame
        self._batch.restart()

    def _step(self, started: float) -> Frame | None:
        assert self._latent is not None  # frames are under way
        latent = self._batch.step(self._batch.enter(self._latent))
        if latent is None:
            return None
        pixels = self._autoencoder.decode(latent)[0]
        self._shown = Frame(self._under_way.popleft(), pixels, False, since(started))
        return self._shown


def stream_timesteps(schedule: NoiseSchedule, steps: int, strength: float) -> tuple[int, ...]:
    """Evenly picked from the last ``strength`` of the timesteps that a consistency model knows, from the noisiest down.

    Source: diffusers' LCMScheduler with ``strength``. Raises ArgumentError: a value that cannot be used.
    """
    if not 0 < strength <= 1:
        raise ArgumentError("The strength cannot be used", got=strength, allowed="above 0, which keeps the picture, to 1")
    solver = min(SOLVER_STEPS, schedule.train_steps)
    left = int(solver * strength)
    check_steps(steps, max(left, 1))
    if not left:
        raise ArgumentError(f"At strength {strength:g} no step of the solver's {solver} is left", do="Take a strength nearer to 1.")
    known = np.arange(left, 0, -1) * (schedule.train_steps // solver) - 1
    return tuple(int(t) for t in known[np.floor(np.linspace(0, left, steps, endpoint=False)).astype(int)])


def _check_guidance(kind: str, of_network: str) -> None:
    if kind not in residual.KINDS:
        raise ArgumentError("No such guidance of a stream", got=repr(kind), allowed=", ".join(residual.KINDS))
    if kind != "none" and of_network != "classifier-free":
        raise ArgumentError(f"A network with {of_network} guidance cannot be guided by other rows", got=kind, allowed="none")


def _rows(conditions: Mapping[str, np.ndarray], rows: tuple[int, int]) -> dict[str, np.ndarray]:
    """Conditions for every row of a call: [1, ...] for all of them, or [2, ...], the unconditional one first."""
    unconditional, conditional = rows
    return {name: np.concatenate([given[:1]] * unconditional + [given[-1:]] * conditional) for name, given in conditions.items()}


def _predict(graph: Graph, conditions: Mapping[str, np.ndarray], shape: Sequence[int]) -> Predict:
    """Calls of a graph with rows of ``shape`` in buffers of their own, into which the conditions are written once."""
    timestep = graph.input("timestep")
    if graph.component.below is not None or len(timestep.shape) != 1 or not isinstance(timestep.shape[0], str):
        raise BundleError(
            f"The graph '{graph.name}' takes one time step for all of its rows, and rows of a stream are at different ones",
            got=f"timestep {list(timestep.shape)}",
            do="Export the pipeline with: edgediffusion export SOURCE -o BUNDLE --row-timesteps",
        )
    shapes: dict[str, Sequence[int | str]] = {name: array.shape for name, array in conditions.items()}
    shapes |= {"sample": shape, "timestep": shape[:1]}
    binding = graph.join(shapes, {})
    for name, array in conditions.items():
        binding.inputs[name][...] = array
    return partial(_call, graph.name, binding)


def _call(name: str, binding: Binding, rows: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    binding.inputs["sample"][...] = rows
    binding.inputs["timestep"][...] = timesteps
    binding.run()
    output = binding.outputs["out_sample"]
    require_finite(output, name)
    return output.astype(np.float32, copy=False)
