"""A folder is a registry: ``find("runtimes.samplers", "euler")`` imports ``edgediffusion.runtimes.samplers.euler``.

A file ``euler_ancestral.py`` is the name ``euler-ancestral``. Nothing is imported to list names, so listing is cheap
and a missing extra of one entry never hides the others.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from edgediffusion.errors import MissingExtra, UnknownName

_ROOT = Path(__file__).parent


def names(registry: str, suffix: str = ".py") -> tuple[str, ...]:
    """Names of the entries of a folder, sorted; files that begin with an underscore are no entries."""
    folder = _ROOT.joinpath(*registry.split("."))
    return tuple(sorted(p.stem.replace("_", "-") for p in folder.glob(f"*{suffix}") if not p.name.startswith("_")))


def find(registry: str, name: str, *, kind: str = "") -> ModuleType:
    """The module of one entry.

    Raises:
        UnknownName: no file of the folder has that name; the message lists those that do.
    """
    stem = name.replace("-", "_")
    # A look at one file: listing the folder is what a small picture would feel, several times each.
    if "_" in name or name.startswith("-") or not stem.isidentifier() or not _ROOT.joinpath(*registry.split("."), f"{stem}.py").is_file():
        raise UnknownName(kind or registry.rsplit(".", 1)[-1].removesuffix("s"), name, names(registry))
    return importlib.import_module(f"edgediffusion.{registry}.{stem}")


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import a library of an optional extra.

    Raises:
        MissingExtra: it is not installed; the message names the extra and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] == error.name.split(".")[0]:
            raise MissingExtra(module, extra, purpose) from None
        raise
