"""Build: the engines of one target, made from a bundle's graphs and kept in a new bundle with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgediffusion import __version__, files, targets
from edgediffusion.bundle import Bundle, Component, Verb, write
from edgediffusion.errors import ArgumentError, EngineError
from edgediffusion.files import link_or_copy
from edgediffusion.runtimes import pick as picking
from edgediffusion.runtimes.build_checks import Job, check_job, check_version, engine_of, taken_by
from edgediffusion.runtimes.engine_manifest import ENGINES, FILE, EngineManifest
from edgediffusion.runtimes.pick import MAX_ERROR, Trial
from edgediffusion.runtimes.reuse import Earlier, Wanted
from edgediffusion.runtimes.sizes import Sizes, axes_of, parse_sizes, range_of, usual_sizes

PICKS = ("order", "measured")
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class _Made:
    """A component's engine: its file, and what made it."""

    file: str
    engine: str
    precision: str = ""
    trials: tuple[Trial, ...] = ()
    reused: bool = False


def build(
    bundle: Bundle,
    output: Path,
    *,
    target: str = "cpu-x86-64",
    threads: int | None = None,
    precision: str | None = None,
    shapes: str | Sizes = "",
    timing_cache: Path | None = None,
    pick: str = "order",
    max_error: float = MAX_ERROR,
    reuse: Bundle | None = None,
    replace: bool = False,
    progress: Progress = lambda label, part: None,
) -> Bundle:
    """Make an engine of every component for ``target``; returns the new bundle, which holds the graphs as well.

    ``target`` is a name, the path of a TOML file, or ``auto``. ``precision`` is what float layers are computed in, for engines that
    let one choose. ``shapes`` are ranges of sizes by the names of axes, or words for them (``batch=1:2:4,height=8``), for engines that
    are made for sizes; axes that it does not name have the bundle's own (``sizes.usual_sizes``). ``timing_cache`` is a file in which
    TensorRT keeps what kernels took. With ``pick`` ``order`` the target's first engine serves every component; with ``measured`` each
    has the engine and precision that were the fastest here of those whose outputs are off by at most ``max_error`` (see ``pick.py``),
    and the table is kept in ``engine.json``.

    ``reuse`` is an earlier bundle with engines for the target: those that would come out the same (``reuse.py``) are taken as they are,
    and the history names them. With ``replace`` there may be a bundle at ``output``, ``bundle`` itself too; it is there until the new one
    is whole, and then the new one is in its place.

    Raises:
        UnknownName: there is no such target.
        ArgumentError: an option that the target's engine does not have, shapes that no component has, no such ``pick``; nothing to reuse.
        MissingExtra, EngineError: the engine library is absent or of a version that the target does not take, the target cannot run a
        graph's number formats or opset, its engines are not built on a machine like this, or the library refused a component (which
        is named).
        OutputError: ``output`` exists or cannot be written.
    """
    if pick not in PICKS:
        raise ArgumentError("There is no such way to pick engines", got=pick, allowed=", ".join(PICKS))
    device = targets.load(target)
    engines = device.engines if pick == "measured" else device.engines[:1]
    asked = parse_sizes(shapes) if isinstance(shapes, str) and shapes else dict(shapes or {})
    given = {"precision": precision, "shapes": asked or None, "timing_cache": timing_cache}
    shapes = {**usual_sizes(bundle), **asked}
    job = Job(bundle, device, engines, given, shapes, asked, threads, max_error)
    check_job(job, version=pick == "order")
    if reuse is not None:
        gpu = device.compute_capability if any("compute_capabilities" in taken_by(name) for name in engines) else ""
        wanted = Wanted(bundle, engines, precision, shapes, gpu, pick == "measured", max_error)
        job = dataclasses.replace(job, earlier=Earlier.of(reuse, device.name, required=reuse is not bundle), wanted=wanted)
    with files.new_folder(output, replace=replace) as folder:
        _write(job, folder, _picked if pick == "measured" else _first, progress)
    return Bundle.open(output)


def _write(job: Job, folder: Path, make: Callable[[Job, Component, Path, Progress], _Made], progress: Progress) -> None:
    """The whole new bundle: the graphs, the engines, what they are, and what was done."""
    bundle, target = job.bundle, job.target.name
    kept = [n for n in bundle.files if not n.startswith(f"{ENGINES}/{target}/")]
    for file in kept:
        link_or_copy(bundle.path / file, folder / file)
    place = folder / ENGINES / target
    place.mkdir(parents=True)
    built = {}
    for at, component in enumerate(bundle.components):
        part = _part_of(progress, at, len(bundle.components))
        built[component.name] = _reused(job, component, place, part) or make(job, component, place, part)
    progress("done", 1.0)
    manifest = _manifest(job, built)
    (place / FILE).write_text(manifest.to_json(), encoding="utf-8")
    history = (*bundle.history, Verb("build", _arguments(job, make, built), {"edgediffusion": __version__, **manifest.versions()}))
    known = {n: bundle.files[n] for n in kept}
    write(folder, family=bundle.family, components=bundle.components, sampling=bundle.sampling, history=history, known=known)


def _arguments(job: Job, make: object, built: Mapping[str, _Made]) -> dict[str, Any]:
    """What the history keeps: what was asked for, and what was taken from an earlier build."""
    measured = make is _picked
    said = {
        **job.given,
        "timing_cache": None,
        "pick": "measured" if measured else None,
        "max_error": job.max_error if measured and job.max_error != MAX_ERROR else None,
        "reused": [name for name, made in built.items() if made.reused],
    }
    return {"target": job.target.name, **{key: _plain(value) for key, value in said.items() if value}}


def _reused(job: Job, component: Component, place: Path, progress: Progress) -> _Made | None:
    if job.earlier is None or job.wanted is None or not job.earlier.fits(component, job.wanted):
        return None
    progress(f"{component.name}: taken from the earlier build", 0.0)
    engine, precision = job.earlier.engine(component.name)
    trials = tuple(Trial(**trial) for trial in job.earlier.trials(component.name))
    return _Made(job.earlier.take(component.name, place), engine, precision, trials, reused=True)


def _first(job: Job, component: Component, place: Path, progress: Progress) -> _Made:
    name = job.engines[0]
    file: str = component.name + engine_of(name).suffix
    progress(component.name, 0.0)
    _build_one(job, component, name, job.given["precision"], place / file, progress)
    return _Made(file, name, job.given["precision"] or "")


def _picked(job: Job, component: Component, place: Path, progress: Progress) -> _Made:
    def build_one(engine: str, precision: str, file: Path) -> None:
        check_version(job.target, engine)
        _build_one(job, component, engine, precision or None, file, lambda label, part: None)

    file, trials = picking.pick(
        component,
        job.bundle.path / component.model,
        place,
        build_one,
        picking.candidates(job.target, job.given["precision"]),
        sampling=job.bundle.sampling,
        sizes=job.shapes,
        max_error=job.max_error,
        threads=job.threads,
        progress=progress,
    )
    (chosen,) = (trial for trial in trials if trial.chosen)
    return _Made(file, chosen.engine, chosen.precision, trials)


def _build_one(job: Job, component: Component, engine: str, precision: str | None, file: Path, progress: Progress) -> None:
    target = job.target
    every = {
        "device": target.device,
        "compute_capabilities": (target.compute_capability,) if target.compute_capability else (),
        "precision": precision,
        "shapes": job.shapes,
        "timing_cache": job.given["timing_cache"],
        "progress": lambda label, part: progress(f"{component.name}: {label}", part),
    }
    options = {name: value for name, value in every.items() if name in taken_by(engine) and value}
    try:
        engine_of(engine).build(job.bundle.path / component.model, file, threads=job.threads, **options)
    except EngineError as error:
        raise EngineError(f"The component '{component.name}' could not be built: {error}", do=_advice(job)) from error


def _advice(job: Job) -> str:
    """A graph with Q/DQ nodes where another engine wants them is a reason to fail that no library names."""
    made = next((verb.arguments for verb in reversed(job.bundle.history) if verb.name == "quantize"), {})
    placement = made.get("placement") or (made and targets.load(str(made.get("target", ""))).placement)
    if not made or placement == job.target.placement:
        return ""
    return (
        f"It was quantized for the placement '{placement}', this target's is '{job.target.placement}': "
        f"edgediffusion quantize BUNDLE --state STATE --target {job.target.name} -o NEW"
    )


def _manifest(job: Job, built: Mapping[str, _Made]) -> EngineManifest:
    """The manifest's engine is the denoiser's; a component that another one serves says so itself."""
    denoisers = [c.name for c in job.bundle.with_role("denoise")]
    main = built[(denoisers or list(built))[0]]
    ranged = {"compute_capabilities", "shapes"} <= set(taken_by(main.engine)) or job.target.device == "npu"
    shapes = {
        name: {
            axis: (r.smallest, r.usual, r.largest)
            for axis in axes_of(job.bundle.component(name).inputs)
            if (r := range_of(axis, job.shapes))
        }
        for name in built
    }
    manifest = EngineManifest.of(
        main.engine,
        engine_of(main.engine).version(),
        job.bundle,
        {name: made.file for name, made in built.items()},
        shapes=shapes if ranged else {},
        compute_capability=job.target.compute_capability if "compute_capabilities" in taken_by(main.engine) else "",
        precision=main.precision,
    )
    others = {name: (made.engine, engine_of(made.engine).version()) for name, made in built.items() if made.engine != main.engine}
    return manifest.served_by(others, [asdict(trial) for made in built.values() for trial in made.trials])


def _part_of(progress: Progress, at: int, of: int) -> Progress:
    return lambda label, part: progress(label, (at + part) / of)


def _plain(value: Any) -> Any:
    return {axis: str(size) for axis, size in value.items()} if isinstance(value, Mapping) else value
