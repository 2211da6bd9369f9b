"""A name and its options as one text, as a command line or a bundle has them: ``ddim:eta=0.5``, ``unipc:order=3,kind=bh1``.

A module of a registry states its options as a frozen dataclass ``Options``, each field with a default of type bool, int,
float or str; its ``__post_init__`` refuses values out of range. A module without ``Options`` has none.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from edgediffusion.errors import ArgumentError
from edgediffusion.registry import find

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


@dataclass(frozen=True)
class Chosen:
    """A module and an instance of its ``Options`` (None if it has none); ``text`` lists those that are not the default."""

    text: str
    module: ModuleType
    options: Any


def choose(registry: str, text: str, *, kind: str = "", made: str = "Options") -> Chosen:
    """Resolve ``name`` or ``name:option=value,option=value``; ``made`` is what the modules call the class of their options.

    Raises:
        UnknownName: no such entry in the registry. ArgumentError: an option that it does not have, or a value that it refuses.
    """
    name, _, rest = text.partition(":")
    module = find(registry, name, kind=kind)
    options: Any = getattr(module, made, None)
    known = {} if options is None else {f.name: f.default for f in fields(options)}
    given = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            listed = ", ".join(f"{key} ({_WORDS[type(value)]}, by default {_shown(value)})" for key, value in known.items())
            raise ArgumentError(f"'{name}' has no option '{key}'", allowed=listed or "none, it has no options")
        given[key] = _value(name, key, value, type(known[key]))
    differing = [f"{key}={_shown(value)}" for key, value in sorted(given.items()) if value != known[key]]
    return Chosen(":".join([name, *([",".join(differing)] if differing else [])]), module, None if options is None else options(**given))


def check_range(option: str, value: float, low: float, high: float) -> None:
    """Refuse a value of an option that is not within [low, high]."""
    if not low <= value <= high:
        raise ArgumentError(f"The option '{option}' cannot be used", got=f"{value:g}", allowed=f"{low:g} to {high:g}")


def check_choice(option: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse a value of an option that is none of ``allowed``."""
    if value not in allowed:
        raise ArgumentError(f"The option '{option}' cannot be used", got=value, allowed=", ".join(map(str, allowed)))


def _value(name: str, key: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        return kind(text)
    except (KeyError, ValueError):
        raise ArgumentError(f"The option '{key}' of '{name}' cannot be used", got=repr(text), allowed=_WORDS[kind]) from None


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
