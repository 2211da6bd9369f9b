"""Every error this package raises on purpose.

    EdgeDiffusionError
    ├── SourceError       what should be exported cannot be read as a pipeline
    ├── BundleError       a bundle that is damaged, newer than this package, or not one at all
    ├── OutputError       the result cannot be written: the folder exists, the disk is full
    ├── ArgumentError     a value that cannot be used: a size, a number of steps, a combination
    │   └── UnknownName   a name that no file of its registry has
    ├── MissingExtra      a library that an optional part needs is not installed
    ├── EngineError       an engine library refused to build, load or run
    └── Cancelled         the caller stopped the work

A message says what is wrong, what was found, what is allowed and what to do, each where there is something to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class EdgeDiffusionError(Exception):
    """Base of all errors of this package; the command line shows its text and nothing else."""

    def __init__(self, wrong: str, *, got: object = None, allowed: str = "", do: str = ""):
        parts = [wrong.rstrip(".") + "."]
        if got is not None:
            parts.append(f"Got: {got}.")
        if allowed:
            parts.append(f"Allowed: {allowed.rstrip('.')}.")
        if do:
            parts.append(do)
        super().__init__(" ".join(parts))


class SourceError(EdgeDiffusionError):
    pass


class BundleError(EdgeDiffusionError):
    pass


class OutputError(EdgeDiffusionError):
    pass


class ArgumentError(EdgeDiffusionError):
    pass


class UnknownName(ArgumentError):
    def __init__(self, kind: str, name: str, known: Iterable[str], *, do: str = ""):
        known = sorted(known)
        near = get_close_matches(name, known, n=1)
        hint = do or (f"Did you mean '{near[0]}'?" if near else "")
        super().__init__(f"No {kind} is called '{name}'", allowed=", ".join(known) or "none", do=hint)


class MissingExtra(EdgeDiffusionError):
    def __init__(self, module: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the Python module '{module}', which is not installed",
            do=f"Install it with: pip install 'edgediffusion[{extra}]'",
        )
        self.module, self.extra = module, extra


class EngineError(EdgeDiffusionError):
    pass


class Cancelled(EdgeDiffusionError):
    pass
