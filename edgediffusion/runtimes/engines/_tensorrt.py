"""TensorRT and TensorRT for RTX by one implementation: their Python modules differ in little more than their names.

Networks are strongly typed, which is the only kind that TensorRT 11 and TensorRT for RTX have: numbers have the formats that the ONNX
file gives them, int8 and fp8 where it has Q/DQ nodes, so there is no precision to choose and no calibrator.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgediffusion import files, targets
from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import EngineError
from edgediffusion.registry import require
from edgediffusion.runtimes.engines._described import Described, described
from edgediffusion.runtimes.engines._tensorrt_run import TensorRTSession, invalidity, open_engine
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.sizes import SizeRange, Sizes, ranges_for

Progress = Callable[[str, float], None]
_TICK_S = 0.5


@dataclass(frozen=True)
class TensorRT:
    """One of the two libraries, by its module's name. ``seconds_per_layer`` is what building takes, for the progress; with 0 the phases
    that the builder tells of are believed."""

    module: str
    extra: str
    title: str
    seconds_per_layer: float = 0.0

    def version(self) -> str:
        return str(self._library().__version__)

    def compute_capability(self) -> str:
        """That of the first NVIDIA GPU here: ``8.7``.

        Raises:
            EngineError: there is none, or its driver does not answer.
        """
        found = [gpu.compute_capability for gpu in targets.cuda_devices() if gpu.compute_capability]
        if not found:
            raise EngineError(f"{self.title} needs an NVIDIA GPU, and this machine shows none", do="Use one with a GPU and its driver.")
        return found[0]

    def build(
        self,
        model: Path,
        engine: Path,
        *,
        threads: int | None = None,
        compute_capabilities: Sequence[str] = (),
        shapes: Sizes | None = None,
        timing_cache: Path | None = None,
        workspace_bytes: int | None = None,
        progress: Progress = lambda label, part: None,
    ) -> None:
        """Make an engine of an ONNX file; writes ``engine`` and ``engine`` + ``.json``.

        ``compute_capabilities`` are those of the GPUs that it is for: TensorRT for RTX builds for any of them anywhere, TensorRT for
        the GPU that is here. ``shapes`` are ranges of sizes for every named axis. ``timing_cache`` is a file that keeps what kernels
        took, for the next build; it is made where there is none. ``workspace_bytes`` bounds the memory that one kernel may use beside
        what it reads and writes, while it is tried and when it runs; by default all that the GPU has. ``threads`` has no use here.

        Raises:
            EngineError: the parser cannot read the graph, the builder has no kernels for it, an axis has no range, or TensorRT is
            asked for another GPU than the one that is here.
        """
        header = read_header(model)
        ranges = ranges_for(header.inputs, shapes or {}, model.parent.name)
        trt, log, name = self._library(), self._log(), f"{model.parent.name}/{model.name}"
        with _mapped(f"{self.title} could not build '{name}'", log):
            builder = trt.Builder(log)
            network = builder.create_network(_flags(trt))
            parser = trt.OnnxParser(network, log)
            if not parser.parse_from_file(str(model)):
                problems = [_problem(parser.get_error(i)) for i in range(parser.num_errors)]
                raise EngineError(f"{self.title} {trt.__version__} cannot read '{name}'", got="; ".join(problems[:3]) or "no reason given")
            allow_decomposition(trt, network)
            config = builder.create_builder_config()
            self._choose(config, compute_capabilities)
            if workspace_bytes is not None:
                config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
            if ranges:
                config.add_optimization_profile(_profile(builder, header.inputs, ranges))
            cache = _timing_cache(config, timing_cache)
            plan = _watched(trt, builder, network, config, progress, network.num_layers * self.seconds_per_layer)
            if plan is None:
                raise EngineError(f"{self.title} could not build '{name}'", got=log.told() or "no reason given")
            engine.write_bytes(plan)
        if cache is not None and timing_cache is not None:
            with files.new_file(timing_cache, replace=True) as file:
                file.write_bytes(config.get_timing_cache().serialize())
        Described(header.inputs, header.outputs, ranges).write(engine)

    def open_session(self, file: Path, *, threads: int | None = None) -> TensorRTSession:
        """Load an engine that ``build`` made. ``threads`` has no use here.

        Raises:
            EngineError: the file is missing, damaged or no engine, there is no GPU, or the engine is for another one.
            MissingExtra: cuda-python is not installed.
        """
        known = described(file)
        self.compute_capability()
        log = self._log()
        with _mapped(f"{self.title} could not load '{file.parent.name}/{file.name}'", log):
            engine = open_engine(self._library(), log, file, self.title)
            return TensorRTSession(engine, known, extra=self.extra, title=self.title, keep=log)

    def invalidity(self, file: Path) -> str:
        """The library's own verdict on an engine file, from its header: why it would not load here, or "".

        Raises:
            EngineError: the file is missing or empty.
        """
        log = self._log()
        with _mapped(f"{self.title} could not read '{file.parent.name}/{file.name}'", log):
            return invalidity(self._library(), log, file)

    def _library(self) -> Any:
        return require(self.module, extra=self.extra, purpose=f"Building and running with {self.title}")

    def _choose(self, config: Any, compute_capabilities: Sequence[str]) -> None:
        if not hasattr(config, "num_compute_capabilities"):
            here = self.compute_capability()
            if any(wanted != here for wanted in compute_capabilities):
                raise EngineError(
                    f"{self.title} builds engines on the GPU that they are for",
                    got=f"compute capability {', '.join(compute_capabilities)}, here {here}",
                    do="Copy the bundle to that machine and build there.",
                )
            return
        known = self._library().ComputeCapability
        names = [f"SM{wanted.replace('.', '')}" for wanted in compute_capabilities]
        if not set(names) <= set(vars(known)):
            numbers = sorted(int(name[2:]) for name in vars(known) if re.fullmatch(r"SM\d+", name))
            raise EngineError(
                f"{self.title} does not build for this compute capability",
                got=", ".join(compute_capabilities),
                allowed=", ".join(f"{n // 10}.{n % 10}" for n in numbers),
            )
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(known, name), index)

    def _log(self) -> Any:
        return _log(self._library())


def _problem(error: Any) -> str:
    """``Teleport 'node_3': Plugin not found``"""
    return f"{error.node_operator()} '{error.node_name()}': {error.desc()}".rstrip(".")


def _flags(trt: Any) -> int:
    """Strongly typed; from TensorRT 11 on there is no other kind, and the flag may be gone."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention be computed by several kernels where no fused one takes it, as in float32: else the whole build fails."""
    boundary = getattr(trt, "IAttentionInputLayer", None)
    if boundary is None:  # TensorRT before 10.14: its parser decomposes
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = boundary  # the way to a layer's own class in TensorRT's Python API
            layer.attention.decomposable = True


def _profile(builder: Any, inputs: Sequence[TensorSpec], ranges: Sizes) -> Any:
    profile = builder.create_optimization_profile()
    for spec in inputs:
        if any(isinstance(size, str) for size in spec.shape):
            of = [SizeRange(size, size, size) if isinstance(size, int) else ranges[size] for size in spec.shape]
            profile.set_shape(spec.name, *([getattr(r, end) for r in of] for end in ("smallest", "usual", "largest")))
    return profile


def _timing_cache(config: Any, file: Path | None) -> Any:
    if file is None:
        return None
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, False)  # False: one of another GPU or version is refused rather than believed
    return cache


def _watched(trt: Any, builder: Any, network: Any, config: Any, progress: Progress, expected_s: float) -> Any:
    """The serialized network, built by another thread while this one tells what the builder does: some of its phases are one step that
    takes nine tenths of the time.

    Where a time is expected, the part that is done is 1 - e^(-t / expected): what is left shrinks as time goes by, and never is
    nothing. Else it is what the phases say. Ctrl-C, or what else ``progress`` raises, ends the build at the library's next step.
    """
    phases, begun, over = Phases(), time.monotonic(), threading.Event()
    if hasattr(config, "progress_monitor"):  # TensorRT 10.0 and later
        config.progress_monitor = _monitor(trt, phases, over)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build_serialized_network, network, config)
        try:
            while not wait([building], timeout=_TICK_S).done:
                part = 1 - math.exp((begun - time.monotonic()) / expected_s) if expected_s else phases.part()
                progress(phases.current or "building", min(part, 0.99))
            return building.result()
        except BaseException:
            over.set()
            raise


def _monitor(trt: Any, phases: Phases, over: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            phases.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            phases.step(name, step)
            return not over.is_set()

        def phase_finish(self, name: str) -> None:
            phases.finish(name)

    return Monitor()


class Phases:
    """The builder's phases, one within the other: how much of the outermost is done, and what the innermost is called."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[int, int, str | None]] = {}  # name -> steps done, steps in all, parent
        self._most = 0.0

    @property
    def current(self) -> str:
        return list(self._steps)[-1] if self._steps else ""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._steps[name] = (0, max(steps, 1), parent)

    def step(self, name: str, step: int) -> None:
        if name in self._steps:
            _, steps, parent = self._steps[name]
            self._steps[name] = (min(step + 1, steps), steps, parent)

    def finish(self, name: str) -> None:
        self._steps.pop(name, None)

    def part(self) -> float:
        """Never less than it was before."""
        within = 0.0
        for done, steps, _ in reversed(list(self._steps.values())):
            within = min((done + within) / steps, 1.0)
        self._most = max(self._most, within)
        return self._most


def _log(trt: Any) -> Any:
    """A logger that keeps what the library complains of, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:  # the lower, the worse
                self.errors.append(message)

        def told(self) -> str:
            """The first complaint: those that follow are of those who asked."""
            return self.errors[0].strip().rstrip(".") if self.errors else ""

    return Log()


@contextmanager
def _mapped(wrong: str, log: Any) -> Iterator[None]:
    """Every exception of the library becomes an EngineError. Its bindings raise plain ones: RuntimeError for what C++ throws, TypeError
    for a pointer that came back empty, ValueError and AttributeError for arguments; what was wrong is in the log."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, OSError) as error:
        raise EngineError(wrong, got=log.told() or f"{type(error).__name__}: {error}") from error
