"""Before an engine is opened: is it for what is here, and for what is asked of it? And where it is not, how it is built anew.

All that differs is told in one message, with the command that builds engines that fit. Prompts, samplers and numbers of steps are not
compared: no engine depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgediffusion import targets
from edgediffusion.bundle import Bundle, Component, Sampling, axis_size
from edgediffusion.bundle.checks import damaged
from edgediffusion.errors import BundleError, EngineError, UnknownName
from edgediffusion.registry import find
from edgediffusion.runtimes import engine_manifest
from edgediffusion.runtimes.engine_manifest import ENGINES, ONNX, BuiltComponent, EngineManifest, asked, host, rebuilding, weights_digest
from edgediffusion.runtimes.sizes import SizeRange, parse_sizes

if TYPE_CHECKING:
    from edgediffusion.runtimes.request import Plan

Progress = Callable[[str, float], None]
_WORDS = {
    "os": "operating system",
    "arch": "architecture",
    "cpu": "processor",
    "gpu": "compute capability",
}


def check(manifest: EngineManifest, bundle: Bundle, target: str, plan: Plan | None = None) -> None:
    """Refuse engines that were built with or for something else than what is here, or with ``plan`` for other sizes.

    Raises:
        EngineError: library version, operating system, processor, GPU, driver, precision, graph, weights or sizes differ; one message
        says all.
        MissingExtra: the engine's library is not installed.
    """
    differing = [*_other_place(manifest), *_other_precision(manifest, target)]
    for component in bundle.components:
        built = manifest.components.get(component.name)
        if built is not None:
            differing += _other_component(bundle, target, component, built)
    differing = differing or _invalid(manifest, bundle, target)
    wrong = _wrong_sizes(manifest, bundle, plan)
    differing += [f"{axis} {low} to {high}, asked for {size}" for axis, (low, high, size) in wrong.items()]
    if differing:
        raise EngineError(
            f"The engines for '{target}' were built for something else",
            got="; ".join(differing),
            do=rebuilding(bundle, target, _wider(manifest, bundle, target, wrong) if wrong else ""),
        )


def ready(
    path: str | Path,
    *,
    target: str | None = None,
    rebuild: bool = False,
    plan: Callable[[Sampling], Plan] | None = None,
    threads: int | None = None,
    progress: Progress = lambda label, part: None,
) -> Bundle:
    """The bundle at ``path``, whose engines fit what is here and, where ``plan`` makes one of its facts, what is asked for.

    With ``rebuild``, engines that do not, or whose files are damaged, are built anew, with the options that they were built with and for
    sizes that include those asked for; the new bundle takes the old one's place. What fits is kept. Without engines, nothing is built.

    Raises:
        BundleError, EngineError, ArgumentError, MissingExtra: as ``Bundle.open``, ``check`` and ``build``.
    """
    if not rebuild:
        bundle = Bundle.open(path)
        planned, chosen = _planned(bundle, plan), engine_manifest.choose(bundle, target)
        if chosen != ONNX:
            check(engine_manifest.read(bundle, chosen), bundle, chosen, planned)
        return bundle
    chosen = engine_manifest.choose(Bundle.open(path, verify=False, skip=f"{ENGINES}/"), target)
    place = "" if chosen == ONNX else f"{ENGINES}/{chosen}/"
    bundle = Bundle.open(path, skip=place)
    planned = _planned(bundle, plan)
    if chosen == ONNX:
        return bundle
    try:
        manifest = engine_manifest.read(bundle, chosen)
    except BundleError:  # engine.json itself is damaged
        return rebuilt(bundle, chosen, threads=threads, progress=progress)
    wrong = _wrong_sizes(manifest, bundle, planned)
    if not wrong and not damaged(bundle, place):
        try:
            check(manifest, bundle, chosen)
            return bundle
        except EngineError:
            pass
    shapes = _wider(manifest, bundle, chosen, wrong) if wrong else ""
    return rebuilt(bundle, chosen, shapes=shapes, threads=threads, progress=progress)


def rebuilt(
    bundle: Bundle, target: str, *, shapes: str = "", threads: int | None = None, progress: Progress = lambda label, part: None
) -> Bundle:
    """A bundle with new engines for ``target`` in the place of ``bundle``, which is opened without looking at them.

    They are built with the options of the last build that the history tells of, but for ``shapes`` where those are given. Engines that
    still fit are kept. The old bundle is there until the new one is whole.

    Raises:
        EngineError: the target is a file of somebody's own, which the bundle does not hold. Others as ``build``.
    """
    from edgediffusion.runtimes.build import build  # reads graphs and times engines: not for those who only draw

    options: dict[str, Any] = {**asked(bundle, target), **({"shapes": shapes} if shapes else {})}
    options |= {"max_error": float(options["max_error"])} if "max_error" in options else {}
    try:
        targets.load(target)
    except UnknownName:
        raise EngineError(
            f"The engines for '{target}' cannot be built anew by themselves: that target is a file of somebody's own",
            do=f"Name it: edgediffusion build {bundle.path} --target {target}.toml -o NEW",
        ) from None
    return build(bundle, bundle.path, target=target, replace=True, reuse=bundle, threads=threads, progress=progress, **options)


def _planned(bundle: Bundle, plan: Callable[[Sampling], Plan] | None) -> Plan | None:
    return None if plan is None or bundle.sampling is None else plan(bundle.sampling)


def _other_place(manifest: EngineManifest) -> list[str]:
    engine, here = find("runtimes.engines", manifest.engine, kind="engine"), host()
    found = {"os": here.os, "arch": here.arch, "cpu": here.cpu or manifest.cpu}
    stated = {"os": manifest.os, "arch": manifest.arch, "cpu": manifest.cpu or here.cpu}
    for name, version in manifest.versions().items():
        found[f"{name} version"], stated[f"{name} version"] = find("runtimes.engines", name).version(), version
    if manifest.compute_capability:
        found["gpu"], stated["gpu"] = _gpu_of(engine), manifest.compute_capability
    alike = {"cpu", *getattr(engine, "portable", ())} if manifest.compute_capability else getattr(engine, "portable", ())
    unlike = sorted((k for k in stated if k not in alike and stated[k] != found[k]), key=lambda k: k in _WORDS)
    differing = [f"{_WORDS.get(k, k)} {_text(stated[k])}, here {_text(found[k])}" for k in unlike]
    driver = engine_manifest.driver_of(manifest.compute_capability) if manifest.driver else ""
    if driver and not targets.in_range(driver, f">={manifest.driver}"):
        differing.append(f"driver {manifest.driver} or newer, here {driver}")
    return differing


def _gpu_of(engine: Any) -> str:
    try:
        return str(engine.compute_capability())
    except EngineError:
        return "no GPU"


def _other_precision(manifest: EngineManifest, target: str) -> list[str]:
    """What a target computes in may have been corrected since."""
    if not manifest.precision or target not in targets.names():
        return []
    able = targets.load(target).formats
    return [] if manifest.precision in able else [f"precision {manifest.precision}, the target has {', '.join(able)}"]


def _other_component(bundle: Bundle, target: str, component: Component, built: BuiltComponent) -> list[str]:
    differing = []
    if built.model_sha256 != bundle.files[component.model].sha256:
        differing.append(f"the ONNX file of '{component.name}' has changed since")
    elif built.weights_sha256 and built.weights_sha256 != weights_digest(bundle, component):
        differing.append(f"the weights of '{component.name}' have changed since")
    if f"{ENGINES}/{target}/{built.file}" not in bundle.files:
        differing.append(f"the file '{built.file}' is not among the bundle's files")
    return differing


def _invalid(manifest: EngineManifest, bundle: Bundle, target: str) -> list[str]:
    """What a library itself says of its files, where it can tell from their headers: TensorRT for RTX."""
    differing = []
    for name, built in manifest.components.items():
        ask = getattr(find("runtimes.engines", manifest.engine_of(name)), "invalidity", None)
        reason = "" if ask is None else ask(bundle.path / ENGINES / target / built.file)
        if reason:
            differing.append(f"{manifest.engine_of(name)} calls the engine of '{name}' invalid here ({reason})")
    return differing


def sizes_of(component: Component, plan: Plan, sampling: Sampling) -> dict[str, int]:
    """The sizes of the axes that a picture of this plan calls a component with."""
    factor = sampling.downsampling
    height, width = plan.latent_shape[2:]
    if component.role == "encode":
        return {"batch": 1}
    if component.role not in ("decode", "encode_image"):  # the denoiser, its parts, and what steers it
        rows = 2 if plan.classifier_free and not plan.separate else 1
        sizes = {"image_height": height * factor, "image_width": width * factor}
        return {"batch": rows * len(plan.prompts), "height": height, "width": width, **sizes}
    if plan.tile:
        height, width = min(height, plan.tile // factor), min(width, plan.tile // factor)
    return {"batch": 1, "height": height, "width": width, "image_height": height * factor, "image_width": width * factor}


def _wrong_sizes(manifest: EngineManifest, bundle: Bundle, plan: Plan | None) -> dict[str, tuple[int, int, int]]:
    """Axes that an engine has a range for and that are out of it: smallest, largest, asked for."""
    wrong: dict[str, tuple[int, int, int]] = {}
    if plan is None or bundle.sampling is None:
        return wrong
    for name, built in manifest.components.items():
        sizes = sizes_of(bundle.component(name), plan, bundle.sampling)
        for axis, (low, _, high) in built.shapes.items():
            size = axis_size(axis, sizes)
            if size is not None and not low <= size <= high and bundle.component(name).role != "encode_image":
                wrong[axis] = (low, high, size)
    return wrong


def _wider(manifest: EngineManifest, bundle: Bundle, target: str, wrong: Mapping[str, tuple[int, int, int]]) -> str:
    """The shapes that were asked for, as far as they are named, with those that are lacking."""
    text = asked(bundle, target).get("shapes", "")
    shapes = parse_sizes(text) if text else {}
    known = {axis: SizeRange(*r) for built in manifest.components.values() for axis, r in built.shapes.items()}
    for axis, (_, _, size) in wrong.items():
        if axis.replace("_", "").isalnum():  # the others are parts of these
            r = shapes.get(axis, known[axis])
            shapes[axis] = SizeRange(min(r.smallest, size), r.usual, max(r.largest, size))
    return ",".join(f"{axis}={size}" for axis, size in shapes.items())


def _text(value: object) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)
