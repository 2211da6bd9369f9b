"""What a built engine cannot say of itself, in a file beside it: ``unet.plan`` and ``unet.plan.json``.

Engine libraries forget the names of axes and some of them the names of types; the ranges of sizes that an engine takes are here too, so
that a size out of them is refused before the library sees it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import EngineError
from edgediffusion.files import dump_json
from edgediffusion.runtimes.sizes import SizeRange, Sizes


@dataclass(frozen=True)
class Described:
    """``ranges`` of the axes that are limited; ``usual`` sizes that something is made for; ``settings`` of the engine's own: the device,
    the precision."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Sizes = field(default_factory=dict)
    usual: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    def write(self, engine: Path) -> None:
        beside(engine).write_text(dump_json(asdict(self)), encoding="utf-8")


def beside(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def described(engine: Path) -> Described:
    """What is written beside an engine.

    Raises:
        EngineError: there is no such file, or it is damaged: then this is no engine that was built here.
    """
    file = beside(engine)
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        inputs, outputs = (tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in content[k]) for k in ("inputs", "outputs"))
        ranges = {str(axis): SizeRange(r["smallest"], r["usual"], r["largest"]) for axis, r in content["ranges"].items()}
        usual = {str(axis): int(size) for axis, size in content["usual"].items()}
        return Described(inputs, outputs, ranges, usual, {str(k): str(v) for k, v in content["settings"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"'{engine.parent.name}/{engine.name}' is no engine that was built here",
            got=f"{file.name}: {type(error).__name__}: {error}",
            do="Build it with: edgediffusion build BUNDLE --target NAME -o NEW",
        ) from None
