"""Bundles whose engines are about to be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgediffusion.bundle import Bundle


def opened(path: Path, *, target: str | None, rebuild: bool, progress: Callable[[str, float], None]) -> Bundle:
    """The bundle; with ``rebuild``, engines that do not fit what is here are built anew first. Errors as ``preflight.ready``."""
    if not rebuild:
        return Bundle.open(path)
    from edgediffusion.runtimes.preflight import ready

    return ready(path, target=target, rebuild=True, progress=progress)
