"""The bundle: the one thing every verb takes and returns. ``docs/bundle-format.md`` specifies its files.

A bundle is a folder that diffusers-like tools can read too (``model_index.json``, a folder per component with
``model.onnx``), plus ``bundle.json``: what each graph is for, what the sampling loop must know, the sha256 of every
file, and the history of verbs that made it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from edgediffusion.errors import BundleError
from edgediffusion.files import dump_json, sha256

_T = TypeVar("_T")  # one of the dataclasses below

FORMAT = 1
MANIFEST = "bundle.json"
CUT_ROLES = ("denoise.shallow", "denoise.head", "denoise.tail")
ROLES = ("encode", "denoise", *CUT_ROLES, "decode", "encode_image")
PREDICTIONS = ("epsilon", "v", "sample", "flow")
GUIDANCE = ("none", "classifier-free", "embedded")


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype name and shape of a graph's input or output; a dynamic axis is its name.

    The name may be a product of other axes' names over an integer, such as ``height/2`` or ``height*width/4``: ``axis_size``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Tokenizer:
    """How text becomes the token ids of an ``encode`` component: a ``tokenizer.json``, cut and padded to ``length``."""

    file: str
    length: int
    pad_id: int
    input: str = "input_ids"


@dataclass(frozen=True)
class Component:
    """One exported graph. ``model`` is its ONNX file, relative to the bundle.

    ``feeds`` says under which name an output is fed to other graphs, where that is not its own: the text encoder's
    ``last_hidden_state`` is the denoiser's ``encoder_hidden_states``. Outputs that it does not list keep their name.
    There may be several denoisers: each but the first takes the time steps ``below`` a number, as far as the next one.
    A part of a denoiser has one of ``CUT_ROLES``; ``cut`` is the module of the source's network that it was cut at.
    """

    name: str
    role: str
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tokenizer: Tokenizer | None = None
    feeds: Mapping[str, str] = field(default_factory=dict)
    below: float | None = None
    cut: str | None = None


@dataclass(frozen=True)
class NoiseSchedule:
    """The training schedule. ``kind`` is diffusers' ``beta_schedule``, or ``flow`` for x_t = (1 - t) x_0 + t noise."""

    kind: str
    train_steps: int
    beta_start: float = 0.0
    beta_end: float = 0.0
    zero_terminal_snr: bool = False
    set_alpha_to_one: bool = True
    spacing: str = "leading"
    steps_offset: int = 0
    shift: float = 1.0


@dataclass(frozen=True)
class Folded:
    """The time steps that a denoiser has rows for in place of its time embedding: those of ``steps`` of ``sampler``."""

    sampler: str
    steps: int
    timesteps: tuple[float, ...]


@dataclass(frozen=True)
class Sampling:
    """What a sampling loop must know and no graph can say.

    ``prediction`` is what ``denoise`` returns; ``guidance_width`` the length of the embedding of w for embedded
    guidance; a picture of H x W pixels has latents of H / downsampling; sizes are multiples of ``size_multiple``;
    ``decode`` takes latents / latent_scale + latent_shift. ``folded`` is there if the denoiser takes some time steps only,
    ``classes`` if it takes ``class_labels``: labels are below it, and it is the label of no class.
    """

    prediction: str
    guidance: str
    schedule: NoiseSchedule
    latent_channels: int
    downsampling: int
    latent_scale: float
    latent_shift: float
    height: int
    width: int
    size_multiple: int
    fixed_size: bool
    sampler: str
    steps: int
    guidance_scale: float
    guidance_width: int = 0
    folded: Folded | None = None
    classes: int | None = None


@dataclass(frozen=True)
class Verb:
    """One step of a bundle's history: what was done, with which arguments, by which versions."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Bundle:
    """A folder on disk and its manifest; never changed once it is written."""

    path: Path
    family: str
    components: tuple[Component, ...]
    sampling: Sampling | None
    history: tuple[Verb, ...]
    files: Mapping[str, File]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Read a bundle and check it: format, paths, presence and (with ``verify``) sha256 of every file.

        Raises:
            BundleError: no bundle, a newer format, a path that leaves the folder, a missing or changed file.
        """
        path = Path(path)
        bundle = _from_json(path, _read_manifest(path))
        _check_files(bundle, verify=verify)
        return bundle

    def component(self, name: str) -> Component:
        for component in self.components:
            if component.name == name:
                return component
        raise BundleError(f"The bundle has no component '{name}'", allowed=", ".join(c.name for c in self.components))

    def with_role(self, role: str) -> tuple[Component, ...]:
        return tuple(c for c in self.components if c.role == role)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The modules that the denoiser was cut at, in the order of the network: each one's graphs are ``with_cut``."""
        return tuple(dict.fromkeys(c.cut for c in self.components if c.cut is not None))

    def with_cut(self, cut: str) -> dict[str, Component]:
        """The parts of the denoiser that one cut made, by role.

        Raises:
            BundleError: the bundle has no such cut.
        """
        found = {c.role: c for c in self.components if c.cut == cut}
        if not found:
            raise BundleError(
                f"The bundle has no graphs for the cut '{cut}'",
                allowed=", ".join(self.cuts) or "none: it was exported without cuts",
                do=f"Export it with this cut: edgediffusion export SOURCE -o BUNDLE --cut {cut}",
            )
        return found

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets that engines were built for."""
        return tuple(sorted({PurePosixPath(f).parts[1] for f in self.files if f.startswith("engines/")}))

    @property
    def digest(self) -> str:
        """Identity of the bundle's contents: the hash that its manifest carries."""
        return _digest(_to_json(self))

    def size_bytes(self, prefix: str = "") -> int:
        """Bytes of the files under ``prefix``; a file that is linked twice counts once."""
        return sum({f.sha256: f.bytes for name, f in self.files.items() if name.startswith(prefix)}.values())


def write(
    folder: Path,
    *,
    family: str,
    components: tuple[Component, ...],
    sampling: Sampling | None,
    history: tuple[Verb, ...],
    known: Mapping[str, File] | None = None,
) -> None:
    """Finish a folder whose other files are in place: hash them and write ``bundle.json``.

    ``known`` carries over the hashes of files that were taken unchanged from a verified bundle.
    """
    files = {}
    hashes = _Hashes()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name != MANIFEST:
            files[name] = (known or {}).get(name) or File(hashes(file), file.stat().st_size)
    bundle = Bundle(folder, family, components, sampling, history, files)
    content = _to_json(bundle)
    (folder / MANIFEST).write_text(dump_json({**content, "sha256": _digest(content)}), encoding="utf-8")


class _Hashes:
    """sha256 of files; one that has several names in a bundle, as weights that graphs share, is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], str] = {}

    def __call__(self, file: Path) -> str:
        stat = file.stat()
        key = (stat.st_dev, stat.st_ino)
        if key not in self._known:
            self._known[key] = sha256(file)
        return self._known[key]


def axis_size(axis: str, sizes: Mapping[str, int]) -> int | None:
    """The size of a named axis: its own in ``sizes``, or that of a product of names over an integer. None where one is lacking."""
    if axis in sizes:
        return sizes[axis]
    product, _, part = axis.partition("/")
    names = product.split("*")
    if not all(name in sizes for name in names) or not (part.isdecimal() or not part):
        return None
    size, divisor = math.prod(sizes[name] for name in names), int(part or 1)
    return size // divisor if divisor and size % divisor == 0 else None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(dump_json(content).encode()).hexdigest()


def _to_json(bundle: Bundle) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "family": bundle.family,
        "components": [component_facts(c) for c in bundle.components],
        "sampling": None if bundle.sampling is None else sampling_facts(bundle.sampling),
        "history": [asdict(v) for v in bundle.history],
        "files": {name: asdict(f) for name, f in bundle.files.items()},
    }


def component_facts(component: Component) -> dict[str, Any]:
    """A component as the manifest has it: ``below`` and ``cut`` only where there is something to say."""
    return {key: value for key, value in asdict(component).items() if key not in ("below", "cut") or value is not None}


def sampling_facts(sampling: Sampling) -> dict[str, Any]:
    """The facts as the manifest has them: ``folded`` and ``classes`` only where there is something to say, as before they were known."""
    return {key: value for key, value in asdict(sampling).items() if key not in ("folded", "classes") or value is not None}


def _read_manifest(path: Path) -> dict[str, Any]:
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
    if stated != _digest(content):
        raise BundleError(f"'{file}' was changed after it was written: its own sha256 does not fit", do="Make the bundle again.")
    return content


def _from_json(path: Path, content: dict[str, Any]) -> Bundle:
    try:
        _refuse_unknown("the manifest", content, {"format", "family", "components", "sampling", "history", "files"})
        return Bundle(
            path=path,
            family=content["family"],
            components=tuple(_component(c) for c in content["components"]),
            sampling=None if content["sampling"] is None else _sampling(content["sampling"]),
            history=tuple(_record(Verb, v) for v in content["history"]),
            files={name: _record(File, f) for name, f in content["files"].items()},
        )
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
    if cut is not None and not (isinstance(cut, str) and cut and content["role"] in CUT_ROLES):
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
    folded = content.get("folded")
    return _record(Sampling, {**content, "schedule": _record(NoiseSchedule, content["schedule"]), "folded": folded and _folded(folded)})


def _folded(content: Mapping[str, Any]) -> Folded:
    timesteps = tuple(content["timesteps"])
    if not timesteps or not all(isinstance(t, (int, float)) and math.isfinite(t) for t in timesteps):
        raise TypeError(f"timesteps of folded are no list of numbers: {timesteps}")
    return _record(Folded, {**content, "timesteps": timesteps})


def _check_files(bundle: Bundle, *, verify: bool) -> None:
    named = [c.model for c in bundle.components] + [c.tokenizer.file for c in bundle.components if c.tokenizer]
    for name in [*named, *bundle.files]:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not name:
            raise BundleError(f"The bundle '{bundle.path}' names a path that leaves its folder", got=repr(name), do="Do not use it.")
        if name not in bundle.files:
            raise BundleError(f"The bundle '{bundle.path}' uses a file that its manifest does not list", got=repr(name))
        file = bundle.path / name
        if not file.is_file():
            raise BundleError(f"The bundle '{bundle.path}' lacks the file '{name}'", do="Make the bundle again.")
        if not file.resolve().is_relative_to(bundle.path.resolve()):
            raise BundleError(f"The bundle '{bundle.path}' has a link that leaves its folder", got=repr(name), do="Do not use it.")
    hashes = _Hashes()
    for name, stated in bundle.files.items():
        file = bundle.path / name
        size = file.stat().st_size
        if size != stated.bytes or (verify and hashes(file) != stated.sha256):
            raise BundleError(
                f"The file '{name}' of the bundle '{bundle.path}' was changed after it was written", do="Make the bundle again."
            )
