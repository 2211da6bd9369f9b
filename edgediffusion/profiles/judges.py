"""Where judges come from: a folder with any classifier as an ONNX file, and a ``judge.json`` that says how to ask it.

docs/quality.md specifies the folder. What ships is ``fashion``, trained on real Fashion-MNIST pictures and nothing else
(training/classifier.py).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

import edgediffusion
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.files import new_file
from edgediffusion.profiles.gaussian import Gaussian, fit
from edgediffusion.profiles.judge import Input, Judge, Outputs
from edgediffusion.registry import find
from edgediffusion.runtimes.engines import Session

FORMAT, MANIFEST = 1, "judge.json"
LAYOUTS = ("nchw", "nhwc")
_SHIPPED = Path(edgediffusion.__file__).parent / "reference"
_SUFFIX = "-classifier"
_SPEC = "See docs/quality.md."


def load(judge: str | Path, *, threads: int | None = None) -> Judge:
    """A shipped judge by its name, or one of a folder.

    Raises:
        ArgumentError: neither of the two, or a folder whose files do not fit together. EngineError: the network cannot
        be loaded. MissingExtra: ONNX Runtime is not installed.
    """
    folder = _folder(judge)
    content = _read(folder / MANIFEST)
    try:
        return _from_json(folder, content, threads)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        raise ArgumentError(f"'{folder / MANIFEST}' cannot be used", got=reason, do=_SPEC) from None


def shipped() -> tuple[str, ...]:
    """Names of the judges that come with the package."""
    return tuple(sorted(file.parent.name.removesuffix(_SUFFIX) for file in _SHIPPED.glob(f"*{_SUFFIX}/{MANIFEST}")))


def write_real(file: Path, features: np.ndarray) -> None:
    """Write the Gaussian of real pictures' features [pictures, features] as the ``.npz`` that a ``judge.json`` names."""
    gaussian = fit(features)
    with new_file(file, replace=True) as partial, open(partial, "wb") as opened:
        np.savez(opened, mean=gaussian.mean, covariance=gaussian.covariance, items=np.int64(gaussian.items))


def _folder(judge: str | Path) -> Path:
    if str(judge) in shipped():
        return _SHIPPED / f"{judge}{_SUFFIX}"
    if not Path(judge).is_dir():
        raise UnknownName("judge", str(judge), shipped(), do="Name one of these, or a folder that holds a judge.json.")
    return Path(judge)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ArgumentError(f"'{file.parent}' is not a judge: it has no {MANIFEST}", do=_SPEC)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"'{file}' is damaged", got=error) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        stated = content.get("format") if isinstance(content, dict) else None
        raise ArgumentError(f"'{file}' has a format that is not known here", got=stated, allowed=str(FORMAT), do=_SPEC)
    return content


def _from_json(folder: Path, content: dict[str, Any], threads: int | None) -> Judge:
    _refuse_unknown("the file", content, {"format", "what", "model", "input", "outputs", "classes", "prompts", "real"})
    taken, given = _record(Input, content["input"]), _record(Outputs, content["outputs"])
    real = dict(content.get("real", {}))
    statistics = real.pop("statistics", None)
    classes = tuple((words,) if isinstance(words, str) else tuple(words) for words in content.get("classes", ()))
    engine = find("runtimes.engines", "onnxruntime")
    judge = Judge(
        name=folder.resolve().name.removesuffix(_SUFFIX),
        input=taken,
        outputs=given,
        classes=classes,
        prompts=tuple(content.get("prompts", ())),
        real=None if statistics is None else _gaussian(_inside(folder, statistics)),
        yardsticks={metric: _yardstick(value) for metric, value in real.items()},
        session=engine.open_session(_inside(folder, content["model"]), threads=threads),
    )
    _check(judge)
    return judge


def _record(kind: type[Any], content: Mapping[str, Any]) -> Any:
    _refuse_unknown(f"'{kind.__name__.lower()}'", content, {f.name for f in fields(cast(Any, kind))})
    return kind(**content)


def _refuse_unknown(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(content) - known):
        raise ValueError(f"{where} has unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _yardstick(value: Any) -> float | dict[int, float]:
    return {int(n): float(v) for n, v in value.items()} if isinstance(value, dict) else float(value)


def _inside(folder: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise ValueError(f"'{name}' leaves the folder")
    if not (folder / name).is_file():
        raise ValueError(f"there is no file '{name}'")
    return folder / name


def _gaussian(file: Path) -> Gaussian:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            mean, covariance = (arrays[name].astype(np.float64) for name in ("mean", "covariance"))
            return Gaussian(mean, covariance, int(arrays["items"]))
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"'{file.name}' is no .npz file: {error}") from None


def _check(judge: Judge) -> None:
    """What the file says fits the network, the words and the statistics: found out by one run."""
    _check_network(judge.session, judge.input, judge.outputs)
    if not all(isinstance(word, str) for words in (*judge.classes, judge.prompts) for word in words):
        raise ValueError("classes are lists of words, and prompts are a list of texts")
    look = judge.look(np.zeros((1, judge.input.height, judge.input.width, judge.input.channels), np.float32))
    if look.logits is not None and judge.classes and look.logits.shape != (1, len(judge.classes)):
        raise ValueError(f"{len(judge.classes)} classes, and logits of shape {look.logits.shape}")
    if look.features is not None and look.features.ndim != 2:
        raise ValueError(f"features of shape {look.features.shape}, which is not one row for a picture")
    if judge.real is not None:
        _check_real(judge.real, 0 if look.features is None else look.features.shape[1])


def _check_network(session: Session, taken: Input, given: Outputs) -> None:
    if taken.layout not in LAYOUTS:
        raise ValueError(f"layout '{taken.layout}' is none of {', '.join(LAYOUTS)}")
    if not np.all(np.asarray(taken.std) > 0):
        raise ValueError(f"std is {taken.std}, not above zero")
    sizes: dict[str, int | str] = {"n": "n", "h": taken.height, "w": taken.width, "c": taken.channels}
    stated: list[int | str] = [sizes[letter] for letter in taken.layout]
    shapes: list[list[int | str]] = [list(spec.shape) for spec in session.inputs]
    if len(shapes) != 1 or not _fits(shapes[0], stated):
        raise ValueError(f"an input of {stated}; the network takes {', '.join(map(str, shapes))}")
    known, named = {s.name for s in session.outputs}, {n for n in (given.logits, given.features, *given.layers) if n}
    if not named or not named <= known:
        raise ValueError(f"outputs {sorted(named)}; the network has {sorted(known)}")


def _fits(shape: list[int | str], stated: list[int | str]) -> bool:
    return len(shape) == 4 and all(isinstance(own, str) or asked in (own, "n") for own, asked in zip(shape, stated, strict=True))


def _check_real(real: Gaussian, features: int) -> None:
    if (real.mean.shape, real.covariance.shape) != ((features,), (features, features)):
        raise ValueError(f"statistics of shape {real.covariance.shape}, and {features} features of the network")
    if not (np.isfinite(real.mean).all() and np.isfinite(real.covariance).all()):
        raise ValueError("statistics hold values that are no numbers")
