"""The statistics of a correction as a file: readable JSON, hashed, and tied to the deployment they were measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.files import dump_json, new_file
from edgediffusion.registry import find, names
from edgediffusion.runtimes.corrections import REGISTRY, Corrector, Deployment, Measured, Parameters, Run, Starts
from edgediffusion.runtimes.corrections._apply import Applied

FORMAT = 1
_WORDS = {
    "model": "the exported pipeline",
    "graph": "the denoiser's files",
    "state": "the quantization state",
    "sampler": "the sampler",
    "steps": "the steps",
    "guidance_scale": "the guidance scale",
}


@dataclass(frozen=True)
class Correction:
    """A measured correction. ``options`` are those of the method, ``measurement`` says how it was measured and what it found."""

    method: str
    options: Mapping[str, Any]
    deployment: Deployment
    parameters: Parameters
    measurement: Mapping[str, Any]
    name: str = ""  # of its file, for messages

    def start(self, run: Run) -> Corrector:
        """Raises:
        ArgumentError: it was measured for something else; the message says what differs.
        """
        ours, theirs = asdict(self.deployment), asdict(run.deployment)
        differing = [f"{word} {_brief(ours[key])}, here {_brief(theirs[key])}" for key, word in _WORDS.items() if ours[key] != theirs[key]]
        if differing:
            raise ArgumentError(
                f"The correction '{self.name or self.method}' was measured for something else",
                got="; ".join(differing),
                do=_advice(self.method, run.deployment),
            )
        return Applied(self.rule.terms(self.parameters), run)

    @property
    def rule(self) -> Measured:
        """The method with its options."""
        return measured(self.method, self.options)

    @property
    def digest(self) -> str:
        return _digest(_to_json(self))

    def save(self, path: Path) -> None:
        """Write the file; an existing one is refused (OutputError)."""
        content = _to_json(self)
        with new_file(path) as partial:
            partial.write_text(dump_json({**content, "sha256": _digest(content)}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Correction:
        """Read a file that ``edgediffusion correct`` wrote.

        Raises:
            ArgumentError: there is no such file, it is no correction, of another format, or was changed.
        """
        content = _read(Path(path))
        try:
            found = cls(
                content["method"],
                content["options"],
                Deployment(**content["deployment"]),
                {name: np.array(values, np.float64) for name, values in content["parameters"].items()},
                content["measurement"],
                str(path),
            )
            terms = found.rule.terms(found.parameters)
            if {terms.scale.ndim, terms.shift.ndim} != {2} or len(terms.scale) != found.deployment.steps:
                raise ValueError(f"its parameters are not those of {found.deployment.steps} steps")
            if not all(np.isfinite(values).all() for values in found.parameters.values()):
                raise ValueError("a parameter is not a finite number")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArgumentError(f"The correction '{path}' lacks or misstates a field: {error}") from None
        return found


def resolve(correction: Starts | str | Path) -> Starts:
    """A correction by the path of its file, or by the name of a method that needs no file; others as they are.

    Raises:
        ArgumentError: a file that cannot be used, or a method that must be measured first.
    """
    if not isinstance(correction, (str, Path)):
        return correction
    if str(correction) not in names(REGISTRY):
        return Correction.load(correction)
    method = find(REGISTRY, str(correction)).Method()
    if not hasattr(method, "start"):
        raise ArgumentError(
            f"The correction '{correction}' must be measured first",
            do=f"Measure it and give its file: edgediffusion correct BUNDLE --reference FLOATBUNDLE --method {correction} -o FILE",
        )
    return cast(Starts, method)


def measured(name: str, options: Mapping[str, Any]) -> Measured:
    """A method that is measured beforehand, by its name.

    Raises:
        UnknownName: no such method. ArgumentError: no such option or value, or a method that needs no measurement.
    """
    kind = find(REGISTRY, name, kind="correction").Method
    if not hasattr(kind, "fit"):
        raise ArgumentError(
            f"The correction '{name}' finds out while it draws: there is nothing to measure beforehand",
            do=f"Draw with it: edgediffusion run BUNDLE --correction {name}",
        )
    known = {field.name for field in fields(kind)}
    if unknown := set(options) - known:
        raise ArgumentError(
            f"The correction '{name}' has no option {', '.join(sorted(unknown))}", allowed=", ".join(sorted(known)) or "none"
        )
    return cast(Measured, kind(**options))


def graph_digest(bundle: Bundle) -> str:
    """Identity of the denoiser's files, graph and weights, by their hashes in the bundle."""
    folders = tuple(c.model.rsplit("/", 1)[0] + "/" for c in bundle.with_role("denoise"))
    hashes = sorted(f.sha256 for name, f in bundle.files.items() if name.startswith(folders))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _to_json(correction: Correction) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "method": correction.method,
        "options": dict(correction.options),
        "deployment": asdict(correction.deployment),
        "parameters": {name: values.tolist() for name, values in correction.parameters.items()},
        "measurement": dict(correction.measurement),
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(dump_json(content).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        own = [name for name in names(REGISTRY) if hasattr(find(REGISTRY, name).Method, "start")]
        raise ArgumentError(
            f"There is no correction '{path}'",
            allowed=f"a file that 'edgediffusion correct' wrote, or {', '.join(own)}",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArgumentError(f"'{path}' is no correction: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ArgumentError(f"'{path}' is no correction of this version", got=f"format {found}", allowed=f"format {FORMAT}")
    if content.pop("sha256", None) != _digest(content):
        raise ArgumentError(f"'{path}' was changed after it was written: its own sha256 does not fit", do="Measure the correction anew.")
    return content


def _brief(value: object) -> str:
    """A digest by its beginning, other values as they are."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return f"{value:g}" if isinstance(value, float) else str(value) or "unknown"


def _advice(method: str, here: Deployment) -> str:
    if " with spacing " in here.sampler:
        return "Draw with the bundle's own spacing: corrections are measured for that."
    settings = f"--sampler {here.sampler} --steps {here.steps} --guidance-scale {here.guidance_scale:g}"
    command = f"edgediffusion correct BUNDLE --reference FLOATBUNDLE --method {method} {settings} -o NEW"
    return f"Measure it anew for what is drawn: {command}"
