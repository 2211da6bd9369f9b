"""``bundle.json`` and records: what is written, and what is refused when it is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from edgediffusion.bundle.records import (
    CUT_ROLES,
    GUIDANCE,
    PREDICTIONS,
    ROLES,
    SHALLOW_CONTROL,
    TIME_IDS,
    Component,
    DynamicShift,
    File,
    Folded,
    NoiseSchedule,
    Sampling,
    TensorSpec,
    Tokenizer,
    Verb,
)
from edgediffusion.errors import BundleError
from edgediffusion.files import dump_json

if TYPE_CHECKING:
    from edgediffusion.bundle import Bundle

_T = TypeVar("_T")  # one of the records

FORMAT = 1
MANIFEST = "bundle.json"
_OF_TEXTS = ("lowercase", "prefix", "prefix_tokens")
_OPTIONAL = ("folded", "classes", "clip", "time_ids", "zero_unconditional")


def content_of(bundle: Bundle) -> dict[str, Any]:
    """The manifest as JSON has it, without its own hash."""
    return {
        "format": FORMAT,
        "family": bundle.family,
        "components": [component_facts(c) for c in bundle.components],
        "sampling": None if bundle.sampling is None else sampling_facts(bundle.sampling),
        "history": [asdict(v) for v in bundle.history],
        "files": {name: asdict(f) for name, f in bundle.files.items()},
    }


def component_facts(component: Component) -> dict[str, Any]:
    """A component as the manifest has it: what may be missing only where there is something to say."""
    facts = _told(asdict(component), ("below", "cut"))
    return {**facts, "tokenizer": facts["tokenizer"] and _told(facts["tokenizer"], _OF_TEXTS)}


def sampling_facts(sampling: Sampling) -> dict[str, Any]:
    """The facts as the manifest has them: those of ``_OPTIONAL`` only where there is something to say, as before they were known."""
    facts = _told(asdict(sampling), _OPTIONAL)
    return {**facts, "schedule": _told(facts["schedule"], ("dynamic_shift",))}


def _told(facts: dict[str, Any], optional: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in optional or value not in (None, (), False, "")}


def digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(dump_json(content).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """The fields of a bundle but its path, as its ``bundle.json`` states them.

    Raises:
        BundleError: there is none, it is damaged, or a reader of this version must not read it.
    """
    return _records(path, _content(path))


def _content(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"'{path}' is not a bundle: it has no {MANIFEST}", do="Make one with: edgediffusion export SOURCE -o BUNDLE")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"'{file}' is damaged: {error}", do="Make the bundle again.") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise BundleError(f"'{file}' is not a bundle manifest: it states no format number")
    if content["format"] > FORMAT:
        raise BundleError(
            f"'{path}' was written by a newer edgediffusion",
            got=f"format {content['format']}",
            allowed=f"format {FORMAT} and older",
            do="Update edgediffusion, or make the bundle again with this version.",
        )
    stated = content.pop("sha256", None)
    if stated != digest(content):
        raise BundleError(f"'{file}' was changed after it was written: its own sha256 does not fit", do="Make the bundle again.")
    return content


def _records(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        _refuse_unknown("the manifest", content, {"format", "family", "components", "sampling", "history", "files"})
        return {
            "family": content["family"],
            "components": tuple(_component(c) for c in content["components"]),
            "sampling": None if content["sampling"] is None else _sampling(content["sampling"]),
            "history": tuple(_record(Verb, v) for v in content["history"]),
            "files": {name: _record(File, f) for name, f in content["files"].items()},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"The manifest of '{path}' lacks or misstates a field: {error}", do="See docs/bundle-format.md.") from None


def _record(kind: type[_T], content: Mapping[str, Any]) -> _T:
    _refuse_unknown(kind.__name__, content, {f.name for f in fields(cast(Any, kind))})
    return kind(**content)


def _refuse_unknown(what: str, content: Mapping[str, Any], known: set[str]) -> None:
    if unknown := set(content) - known:
        raise TypeError(f"{what} has no field {', '.join(sorted(unknown))}")


def _component(content: Mapping[str, Any]) -> Component:
    if content["role"] not in ROLES:
        raise TypeError(f"role '{content['role']}' is none of {', '.join(ROLES)}")
    specs = {key: tuple(_record(TensorSpec, {**s, "shape": tuple(s["shape"])}) for s in content[key]) for key in ("inputs", "outputs")}
    feeds = content.get("feeds", {})
    if not set(feeds) <= {spec.name for spec in specs["outputs"]} or not all(isinstance(name, str) for name in feeds.values()):
        raise TypeError(f"feeds {feeds} names an output that the graph does not have")
    below = content.get("below")
    if below is not None and not (isinstance(below, (int, float)) and math.isfinite(below) and content["role"] == "denoise"):
        raise TypeError(f"below {below} is no time step of a denoiser")
    cut = content.get("cut")
    if cut is not None and not (isinstance(cut, str) and cut and content["role"] in (*CUT_ROLES, SHALLOW_CONTROL)):
        raise TypeError(f"cut {cut!r} is no module that a part of a denoiser was cut at")
    tokenizer = content["tokenizer"] and _record(Tokenizer, content["tokenizer"])
    return _record(Component, {**content, **specs, "tokenizer": tokenizer})


def _sampling(content: Mapping[str, Any]) -> Sampling:
    for key, allowed in (("prediction", PREDICTIONS), ("guidance", GUIDANCE)):
        if content[key] not in allowed:
            raise TypeError(f"{key} '{content[key]}' is none of {', '.join(allowed)}")
    classes = content.get("classes")
    if classes is not None and not (isinstance(classes, int) and classes > 0):
        raise TypeError(f"classes {classes} is no number of classes")
    clip, time_ids = content.get("clip"), tuple(content.get("time_ids", ()))
    if clip is not None and not (isinstance(clip, (int, float)) and math.isfinite(clip) and clip > 0):
        raise TypeError(f"clip {clip} is no bound of x_0")
    if not set(time_ids) <= set(TIME_IDS):
        raise TypeError(f"time_ids {', '.join(map(str, time_ids))} are not all of {', '.join(TIME_IDS)}")
    folded = content.get("folded")
    parts = {"schedule": _schedule(content["schedule"]), "folded": folded and _folded(folded), "time_ids": time_ids}
    return _record(Sampling, {**content, **parts})


def _schedule(content: Mapping[str, Any]) -> NoiseSchedule:
    dynamic = content.get("dynamic_shift")
    return _record(NoiseSchedule, {**content, "dynamic_shift": dynamic and _record(DynamicShift, dynamic)})


def _folded(content: Mapping[str, Any]) -> Folded:
    timesteps = tuple(content["timesteps"])
    if not timesteps or not all(isinstance(t, (int, float)) and math.isfinite(t) for t in timesteps):
        raise TypeError(f"timesteps of folded are no list of numbers: {timesteps}")
    return _record(Folded, {**content, "timesteps": timesteps})
