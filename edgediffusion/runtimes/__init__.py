"""The runtime: draws with a bundle's engines. Needs NumPy, one engine library, tokenizers and Pillow; never torch.

Names of this package load their module when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgediffusion.runtimes.loop import Result, Step, Timings
    from edgediffusion.runtimes.pipeline import Pipeline
    from edgediffusion.runtimes.request import Request

__all__ = ["Pipeline", "Request", "Result", "Step", "Timings"]

_HOMES = {"Pipeline": "pipeline", "Request": "request"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'loop')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
