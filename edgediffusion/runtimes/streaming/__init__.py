"""Streaming: frames in, frames out, one call of the network a frame. Kodaira et al. 2023 (2312.12491), StreamDiffusion.

batch.py     the stream batch: every row is another frame at another step
residual.py  guidance without the unconditional half of the batch
filter.py    frames that are like the last one are not drawn again
stream.py    all of it around a bundle
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgediffusion.runtimes.streaming.stream import Frame, Stream

__all__ = ["Frame", "Stream"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.stream"), name)
