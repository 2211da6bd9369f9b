"""An estimate as text: a table of components, what was tried, and the verdict."""

from __future__ import annotations

from edgediffusion.profiles.fit import Fit
from edgediffusion.text import size, table

_HEAD = ("component", "format", "weights", "activations", "workspace", "total", "GFLOP", "moved", "time", "bound by", "calls")


def fit_table(found: Fit) -> str:
    rows = [
        (
            part.name,
            part.format,
            *map(size, (part.weight_bytes, part.activation_bytes, part.workspace_bytes, part.total_bytes)),
            f"{part.operations / 1e9:.3g}",
            size(part.moved_bytes),
            duration(part.seconds),
            part.bound,
            part.calls,
        )
        for part in found.components
    ]
    tried = [(way.name, size(way.needed_bytes), duration(way.picture_s), "yes" if way.fits else "no") for way in found.tried]
    return "\n".join(
        [
            f"{found.target}: {found.height} x {found.width} pixels, {found.steps} steps, {_pictures(found.batch)} at a time",
            "",
            table(_HEAD, rows),
            "",
            table(("tried, each on top of the former", "memory", "picture", "fits"), tried),
            "",
            f"one step of the denoiser: {duration(found.step_s)}; a picture: {duration(found.picture_s)}",
            f"memory: {size(found.needed_bytes)}, of which the engine's library {size(found.idle_bytes)}; "
            f"there is {size(found.available_bytes)}, before what the system takes",
            _verdict(found),
            *(f"known error, {what}: {error}" for what, error in found.known_error.items()),
            *([f"figures of the target that no page confirms: {', '.join(found.unverified)}"] if found.unverified else []),
        ]
    )


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _pictures(count: int) -> str:
    return "one picture" if count == 1 else f"{count} pictures"


def _verdict(found: Fit) -> str:
    if found.fits:
        return "It fits." if len(found.tried) == 1 else f"It fits, with: {'; '.join(way.name for way in found.tried[1:])}."
    least = f"It does not fit: with all that can be traded it takes {size(found.needed_bytes)}"
    return f"{least}; the smallest known target with as much is '{found.smallest_target}'." if found.smallest_target else f"{least}."
