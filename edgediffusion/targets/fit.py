"""How long work should take on a target, and what it has room for: arithmetic over a target's facts and a workload of plain numbers.

Each node takes operations / rate + bytes / bandwidth + a constant: the roofline of Williams et al. (2009) with a sum in place of its
maximum, because engines overlap the two in part only; it is never below the roofline and never more than twice it. A rate is
a share of the target's peak. The shares are in ``_rates.toml``; ``docs/fit.md`` says where they are from and how far they are off.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgediffusion.errors import ArgumentError
from edgediffusion.targets import Target, load, names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = Path(__file__).with_name("_rates.toml")
_PROCESSORS = ("onnxruntime", "openvino")
_HALF_SUMS = 3.0  # of float16's peak to float32's: two on GeForce, where float16 is stated with sums in float32, and four or more elsewhere
_TF32 = 8.0  # the first compute capability that has it
_CACHED = 16_000_000  # bytes of a node that stay in a processor's caches: half of 32 MB, the other half is the next node's


@dataclass(frozen=True)
class Processor:
    """What was measured of a processor: float32 operations a second of all its cores, bytes a second of copying within caches and
    beyond them, and how much memory it has. ``instructions`` are those of the target's ``per_cycle`` that it has."""

    float32: float
    cached_bandwidth: float
    bandwidth: float
    memory_bytes: int
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One node of a workload. ``format`` is that of its products, empty where it has none."""

    operations: float
    format: str
    weight_bytes: float
    moved_bytes: float


@dataclass(frozen=True)
class Rates:
    """Operations a second by format, bytes a second of memory and of caches, seconds of a node that does nothing."""

    operations: Mapping[str, float]
    bandwidth: float
    cached_bandwidth: float
    node_s: float

    def of(self, format: str) -> float:
        """The rate of a format, or where the target has no kernels for it of the float that its codes are turned into."""
        wider = {"fp4": "fp8", "fp8": "float16", "int4": "int8", "int8": "float16", "bfloat16": "float16", "float16": "float32"}
        while format not in self.operations and format in wider:
            format = wider[format]
        return self.operations.get(format, min(self.operations.values()))


@dataclass(frozen=True)
class Estimate:
    """Seconds of computing and of moving bytes, and of all; ``bound`` says which of the two is more."""

    seconds: float
    compute_s: float
    memory_s: float

    @property
    def bound(self) -> str:
        return "compute" if self.compute_s > self.memory_s else "memory"


def estimate(pieces: Iterable[Piece], rates: Rates) -> Estimate:
    """The time of a call that runs the pieces one after the other."""
    compute = memory = nodes = 0.0
    for piece in pieces:
        compute += piece.operations / rates.of(piece.format) if piece.operations else 0.0
        near = piece.moved_bytes <= _CACHED
        memory += piece.weight_bytes / rates.bandwidth + piece.moved_bytes / (rates.cached_bandwidth if near else rates.bandwidth)
        nodes += rates.node_s
    return Estimate(compute + memory + nodes, compute, memory)


def engine_of(target: Target) -> str:
    """The table of ``_rates.toml`` that serves a target: by its first engine."""
    return "tensorrt" if target.engines[0].startswith("tensorrt") else target.engines[0]


def rates(target: Target, processor: Processor | None = None) -> Rates:
    """What the engine of a target reaches there. A processor's come from what was measured of it, a GPU's from the target's facts.

    Raises:
        ArgumentError: the target's file lacks the facts that this takes, or nothing is known of its architecture.
    """
    engine = engine_of(target)
    table = known_rates().get(engine)
    if target.device == "cpu" and engine in _PROCESSORS and table is not None:
        return _of_processor(target, processor, table)
    if engine != "tensorrt":
        raise ArgumentError(f"How fast '{engine}' is on '{target.name}' is not known: no figure for it was found or measured")
    lacking = [key for key in ("bandwidth_gb_s", "peak_tops", "compute_capability") if not getattr(target, key)]
    if lacking:
        raise _lacks(target, lacking)
    return gpu_rates(target, known_rates()["tensorrt"])


def gpu_rates(target: Target, table: Mapping[str, Any]) -> Rates:
    """Shares of the peaks of the formats that have kernels on a GPU. float32 is TF32 where there is such a thing, as TensorRT has it by
    default: half of float16's rate, where the target does not say. GeForce adds float16 products up in float32 at half its rate, and
    states that; TensorRT may add in float16."""
    share = _share(table, target.compute_capability)
    peaks = {f: tops * 1e12 for f, tops in target.peak_tops.items() if f in target.formats}
    if float(target.compute_capability) >= _TF32 and "float16" in target.peak_tops:
        peaks["float32"] = target.peak_tops.get("tf32", target.peak_tops["float16"] / 2) * 1e12
    if 0 < target.peak_tops.get("float16", 0.0) < _HALF_SUMS * target.peak_tops.get("float32", 0.0):
        peaks["float16"] = 2 * target.peak_tops["float16"] * 1e12
    operations = {f: peak * share * (table["eight_bit"] if f in ("int8", "fp8") else 1.0) for f, peak in peaks.items()}
    bandwidth = target.bandwidth_gb_s * 1e9 * table["bandwidth"]
    return Rates(operations, bandwidth, bandwidth, table["node_us"] * 1e-6)


def memory_bytes(target: Target, processor: Processor | None = None) -> int:
    """What a target has, before its system and its desktop take theirs.

    Raises:
        ArgumentError: it is not known.
    """
    if target.memory_gb:
        return round(target.memory_gb * 2**30)
    if processor is not None:
        return processor.memory_bytes
    raise _lacks(target, ["memory_gb"])


def idle_bytes(target: Target) -> int:
    """What a process takes that has loaded the engine's library and no graph."""
    return round(float(known_rates()[engine_of(target)]["idle_mb"]) * 1e6)


def known_error(target: Target) -> dict[str, str]:
    """How far estimates were off where they were checked, in words, by what was checked; and what was not."""
    table = known_rates()[engine_of(target)]
    found = dict(table.get("error", {}))
    if "peak" in table and target.compute_capability not in table["peak"]:
        known = ", ".join(table["peak"])
        found[f"compute capability {target.compute_capability}"] = f"not known: shares were fitted for {known}, the nearest of which it has"
    return found


def smallest_with(bytes_needed: int, *, device: str, architecture: str = "") -> Target | None:
    """The known target with the least memory that has as much, of the same kind of device."""
    fitting = [t for t in map(load, names()) if t.device == device and t.memory_gb * 2**30 >= bytes_needed]
    return min(fitting, key=lambda t: (t.memory_gb, t.architecture != architecture, t.name), default=None)


@cache
def known_rates() -> dict[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


def _of_processor(target: Target, processor: Processor | None, table: Mapping[str, Any]) -> Rates:
    if processor is None and target.peak_tops.get("float32") and target.bandwidth_gb_s:
        float32, bandwidth = target.peak_tops["float32"] * 1e12, target.bandwidth_gb_s * 1e9
        fixed = {f: tops * 1e12 for f, tops in target.peak_tops.items() if f in target.formats}
        return Rates({**fixed, "float32": float32}, bandwidth, bandwidth, table["node_us"] * 1e-6)
    if processor is None:
        raise _lacks(target, [k for k in ("peak_tops", "bandwidth_gb_s") if not getattr(target, k)])
    fast = any("int8" in target.per_cycle.get(name, {}) for name in processor.instructions)
    operations = {f: float(table[f]) * processor.float32 for f in target.formats if f in table}
    if not fast:  # without instructions for products of bytes, codes are no faster than floats
        operations["int8"] = operations["float32"]
    return Rates(operations, processor.bandwidth, processor.cached_bandwidth * table["cached"], table["node_us"] * 1e-6)


def _share(table: Mapping[str, Any], capability: str) -> float:
    """That of the compute capability; where none was fitted, of the nearest older one, else the nearest newer."""
    shares = {float(key): value for key, value in table["peak"].items()}
    wanted = float(capability)
    older = [key for key in shares if key <= wanted]
    return float(shares[max(older) if older else min(shares)])


def _lacks(target: Target, keys: Iterable[str]) -> ArgumentError:
    return ArgumentError(
        f"The target '{target.name}' lacks facts that an estimate takes",
        got=f"no {', '.join(keys)}",
        do="Give them in a TOML of your own (docs/targets.md), or run this on the machine itself: --target auto.",
    )
