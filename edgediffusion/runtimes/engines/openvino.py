"""OpenVINO on a processor, or Intel's GPUs and NPUs. A built engine is the compiled model, twice.

On a processor the kernels for sizes that are known beforehand take half of the time of those for any sizes, and for int8 less than
that (docs/engines.md). So an engine is ``unet.openvino``, which takes any sizes, and ``unet.openvino.fixed`` for the usual ones; which
of them runs depends on the sizes that buffers are bound for, and the other is not loaded. An NPU has fixed sizes only.

A compiled model says nothing of how it was compiled: loaded without settings, it computes in bfloat16 wherever the processor can,
whatever it was built for. They are written beside it, and given again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import TensorSpec, axis_size
from edgediffusion.errors import EngineError
from edgediffusion.registry import require
from edgediffusion.runtimes.engines import NOT_SHARED, allocate
from edgediffusion.runtimes.engines._described import Described, described
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.sizes import SizeRange, Sizes, check_sizes, ranges_for

suffix = ".openvino"
options = ("device", "precision", "shapes")

_FIXED = ".fixed"
_DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
_HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_CAPABILITIES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
_DEFAULT_PRECISION = {"cpu": "float32", "gpu": "float16", "npu": "float16"}
Load = Callable[[str], Any]  # which of an engine's compiled models, "" or ".fixed" -> it


def version() -> str:
    return str(_library().__version__).partition("-")[0]


def build(
    model: Path,
    engine: Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    precision: str | None = None,
    shapes: Sizes | None = None,
) -> None:
    """Compile an ONNX file for a device that is here; writes ``engine``, ``engine`` + ``.fixed`` and ``engine`` + ``.json``.

    ``precision`` is what float layers are computed in: by default float32 on a processor, float16 elsewhere. ``shapes`` are ranges
    of sizes by axis, whose usual ones the fixed model is for; without them there is none.

    Raises:
        EngineError: no such device here, or none that computes in ``precision``; OpenVINO cannot read or compile the graph.
    """
    header = read_header(model)
    name = _device(device)
    precision = _precision(name, precision or _DEFAULT_PRECISION[device])
    only_fixed = device == "npu"
    ranges = {} if shapes is None else ranges_for(header.inputs, shapes, model.parent.name)
    if only_fixed and not ranges:
        raise EngineError("An NPU takes engines of fixed sizes only", do="Say which: --shapes AXIS=SIZE,...")
    settings = {"device": name, "precision": precision}
    with _mapped(f"OpenVINO could not compile '{model.parent.name}/{model.name}'"):
        graph = _library().Core().read_model(str(model))
        if not only_fixed:
            engine.write_bytes(_compile(graph, settings, threads).export_model().getvalue())
        if ranges:
            shape = {s.name: [n if isinstance(n, int) else ranges[n].usual for n in s.shape] for s in header.inputs}
            graph.reshape(shape)
            fixed = _compile(graph, settings, threads).export_model().getvalue()
            engine.with_name(engine.name + _FIXED).write_bytes(fixed)
            if only_fixed:
                engine.write_bytes(b"")  # the name by which the engine goes
    usual = {axis: r.usual for axis, r in ranges.items()}
    limits = {axis: SizeRange(size, size, size) for axis, size in usual.items()} if only_fixed else {}
    Described(header.inputs, header.outputs, limits, usual, settings).write(engine)


def open_session(file: Path, *, threads: int | None = None) -> OpenVinoSession:
    """Load an engine that ``build`` made, or any ONNX file: on the processor, in float32, for any sizes.

    Raises:
        EngineError: the file is missing or damaged, its device is not here, or OpenVINO cannot compile it.
    """
    core = _library().Core()
    if not file.name.endswith(suffix):
        header = read_header(file)
        with _mapped(f"OpenVINO could not load '{file.parent.name}/{file.name}'"):
            compiled = _compile(core.read_model(str(file)), {"device": "CPU", "precision": "float32"}, threads)
            outputs = tuple(spec if spec.dtype else _spec(compiled.output(spec.name)) for spec in header.outputs)
        return OpenVinoSession(Described(header.inputs, outputs), lambda which: compiled)
    known = described(file)
    _device(known.settings["device"].lower())

    def load(which: str) -> Any:
        with _mapped(f"OpenVINO could not load '{file.parent.name}/{file.name}{which}'"):
            # mapped and not read: OpenVINO copies what it keeps
            content = np.memmap(file.with_name(file.name + which), dtype=np.uint8, mode="r")
            tensor = _library().Tensor(content)
            return core.import_model(tensor, known.settings["device"], _settings(known.settings, threads))

    return OpenVinoSession(known, load)


class OpenVinoSession:
    def __init__(self, known: Described, load: Load):
        """Loads the model that the usual sizes need, so that a damaged file is found out at once."""
        self.inputs, self.outputs = known.inputs, known.outputs
        self._known, self._load = known, load
        self._models: dict[str, Any] = {}
        self._model(_FIXED if known.usual else "")

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> OpenVinoBinding:
        """Buffers that OpenVINO reads and writes in place. An output axis that ``axes`` lacks is found out by one run on zeros.

        Raises:
            EngineError: ``axes`` lacks an axis of an input or has a size that the engine cannot take, or a shared array does not fit.
        """
        check_sizes(axes, self._known.ranges, self._known.settings.get("device", "OpenVINO"))
        inputs = allocate(self.inputs, axes, shared)
        usual = bool(self._known.usual) and all(axes.get(axis) == size for axis, size in self._known.usual.items())
        model = self._model(_FIXED if usual else "")
        given = [spec for spec in self.outputs if spec.name not in shared]
        lacking = [spec for spec in given if any(isinstance(n, str) and axis_size(n, axes) is None for n in spec.shape)]
        if lacking:
            with _mapped("OpenVINO could not run the graph"):
                request = _request(model, inputs, {})
                request.infer()
                found = {spec.name: np.zeros_like(request.get_tensor(spec.name).data) for spec in lacking}
            shared = {**shared, **found}
        return OpenVinoBinding(model, inputs, allocate(self.outputs, axes, shared))

    def _model(self, which: str) -> Any:
        if which not in self._models:
            self._models[which] = self._load(which)
        return self._models[which]


class OpenVinoBinding:
    def __init__(self, model: Any, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]):
        self.inputs, self.outputs = inputs, outputs
        with _mapped("OpenVINO could not take the buffers"):
            self._request = _request(model, inputs, outputs)

    def run(self) -> None:
        with _mapped("OpenVINO could not run the graph"):
            self._request.start_async()  # infer() would also make a new array of every output
            self._request.wait()


def _request(model: Any, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Any:
    request = model.create_infer_request()
    for name, array in (*inputs.items(), *outputs.items()):
        request.set_tensor(name, _library().Tensor(array, shared_memory=True))
    return request


def _spec(port: Any) -> TensorSpec:
    """An output as OpenVINO infers it."""
    name = port.get_any_name()
    shape = [f"{name}.{i}" if size.is_dynamic else size.get_length() for i, size in enumerate(port.get_partial_shape())]
    return TensorSpec(name, np.dtype(port.get_element_type().to_dtype()).name, tuple(shape))


def _library() -> Any:
    return require("openvino", extra="openvino", purpose="Running with OpenVINO")


def _device(device: str) -> str:
    """OpenVINO's name of a target's device, if there is one here."""
    if device not in _DEVICES:
        raise EngineError("OpenVINO knows no such device", got=device, allowed=", ".join(_DEVICES))
    here = [name.partition(".")[0] for name in _library().Core().available_devices]  # "GPU.0" where there are two
    if _DEVICES[device] not in here:
        raise EngineError(
            f"OpenVINO finds no {_DEVICES[device]} on this machine",
            allowed=", ".join(here) or "none",
            do="Build and run there where the device and its driver are.",
        )
    return _DEVICES[device]


def _precision(device: str, precision: str) -> str:
    if precision not in _HINTS:
        raise EngineError("OpenVINO does not compute float layers in this format", got=precision, allowed=", ".join(_HINTS))
    able = _library().Core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITIES[precision] not in able:
        allowed = ", ".join(name for name, word in _CAPABILITIES.items() if word in able)
        raise EngineError(f"OpenVINO has no kernels for {precision} on this {device}", allowed=allowed)
    return precision


def _compile(graph: Any, settings: Mapping[str, str], threads: int | None) -> Any:
    return _library().Core().compile_model(graph, settings["device"], _settings(settings, threads))


def _settings(settings: Mapping[str, str], threads: int | None) -> dict[str, Any]:
    """One picture after the other is what a loop does: latency, not throughput. Without a number of threads OpenVINO counts the cores
    that this process may use."""
    chosen: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[settings["precision"]]}
    if threads and settings["device"] == "CPU":
        chosen["INFERENCE_NUM_THREADS"] = threads
    return chosen


@contextmanager
def _mapped(wrong: str) -> Iterator[None]:
    """Every exception that OpenVINO raises becomes an EngineError. It has no classes of its own: its C++ exceptions arrive as
    RuntimeError, wrong arguments as TypeError or ValueError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise EngineError(wrong, got=f"{type(error).__name__}: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    """What it says, without the places in its sources that it passed through."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from ", "Check '", "While validating"))]
    return " ".join(told or lines)
