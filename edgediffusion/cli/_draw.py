"""Draw with a bundle and put the pictures on disk, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

from edgediffusion.cli._latents import SUFFIX, read_latents, write_latents
from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.files import new_file
from edgediffusion.registry import require

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_GAP = 4


@dataclass(frozen=True)
class Drawing:
    """Where pictures go: ``output`` itself, or for several laid out as ``files`` numbered ones beside it; ``latents`` go into one file."""

    output: Path
    layout: str = "grid"
    force: bool = False
    latents: bool = False

    def files(self, count: int) -> tuple[Path, ...]:
        """The files that ``count`` pictures fill; refused before any work is done for them.

        Raises:
            ArgumentError: the name ends in no picture format, or not as latents do.
            OutputError: one exists, and they may not be replaced.
        """
        if self.latents and self.output.suffix.lower() != SUFFIX:
            raise ArgumentError(f"What --denoising-end leaves is no picture, and '{self.output}' does not end like latents", allowed=SUFFIX)
        if not self.latents and self.output.suffix.lower() not in _FORMATS:
            raise ArgumentError(f"'{self.output}' does not end like a picture", allowed=", ".join(_FORMATS))
        numbered = count > 1 and self.layout == "files" and not self.latents
        files = tuple(self.output.with_stem(f"{self.output.stem}-{n}") for n in range(1, count + 1)) if numbered else (self.output,)
        for file in files:
            if file.is_dir() or (file.exists() and not self.force):
                raise OutputError(f"The output '{file}' exists already", do="Choose another name, or give --force to replace a picture.")
        return files


@dataclass(frozen=True)
class Drawn:
    """What was drawn: the files, and what it takes to draw them again."""

    files: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    encode_ms: float
    step_ms: tuple[float, ...]
    decode_ms: float
    warnings: tuple[str, ...]


def draw(
    bundle: Path,
    prompts: Sequence[str],
    drawing: Drawing,
    *,
    target: str | None,
    rebuild: bool = False,
    max_memory: str | None = None,
    progress: Callable[[str, float], None],
    cache: str | None = None,
    images: Sequence[Path] = (),
    masks: Sequence[Path] = (),
    control_images: Sequence[Path] = (),
    control_scales: Sequence[float] = (),
    control_part: Sequence[float] | None = None,
    class_labels: Sequence[int] = (),
    **options: Any,
) -> Drawn:
    """Draw and write the pictures as ``drawing`` says. ``options`` are the others of ``runtimes.Request``.

    A single one of ``images``, ``masks``, ``class_labels`` and further prompts is for all prompts. Without ``prompts`` there is one
    picture, or one for each class.
    """
    files = drawing.files(max(len(prompts), 1 if prompts else len(class_labels), 1) * options["num_images"])
    require("PIL", extra="cpu", purpose="Writing a picture")
    from edgediffusion.runtimes import Pipeline
    from edgediffusion.runtimes.images import open_image
    from edgediffusion.runtimes.preflight import ready
    from edgediffusion.runtimes.request import Request, plan

    progress("loading", 0.0)
    options |= {"image": _started(images, options["denoising_start"]), "mask_image": _single([open_image(file) for file in masks])}
    options |= {"class_labels": _single(class_labels), **{name: _single(options[name]) for name in ("prompt_2", "prompt_3")}}
    if control_images:
        options["control_image"] = _single([open_image(file) for file in control_images])
    if control_scales:
        options["controlnet_conditioning_scale"] = _single(control_scales)
    if control_part is not None:
        options["control_guidance_start"], options["control_guidance_end"] = _pair("--control-part", control_part)
    asked = prompts or None
    request = Request(asked, cache=cache, **{name: value for name, value in options.items() if name != "correction"})
    # What cannot be drawn, or not by these engines, is refused before minutes of loading.
    opened = ready(bundle, target=target, rebuild=rebuild, plan=lambda facts: plan(request, facts), progress=progress)
    if asked is None and opened.with_role("encode"):
        raise ArgumentError("This bundle draws what a text says", do='Say it: --prompt "...".')
    pipeline = Pipeline.from_bundle(opened, target=target, cache=cache, max_memory=max_memory)
    result = pipeline(asked, callback=lambda step: progress("sampling", (step.index + 1) / step.total), **options)
    if drawing.latents:
        write_latents(result.latents, drawing.output, replace=drawing.force)
    else:
        _write(result.images, files, drawing)
    times = result.timings
    return Drawn(tuple(map(str, files)), tuple(prompts), result.seeds, times.encode_ms, times.step_ms, times.decode_ms, result.warnings)


def _started(images: Sequence[Path], start: float | None) -> Any:
    """The pictures to start from, or the latents that another network left."""
    from edgediffusion.runtimes.images import open_image

    if start is None:
        return _single([open_image(file) for file in images])
    if len(images) != 1:
        raise ArgumentError(
            "--denoising-start takes what another network left",
            got=f"{len(images)} times --image",
            allowed="one --image, the file that 'edgediffusion run --denoising-end' wrote",
        )
    return read_latents(images[0])


def _write(pictures: Sequence[Any], files: Sequence[Path], drawing: Drawing) -> None:
    for file, picture in zip(files, pictures if len(files) > 1 else [grid(pictures)], strict=True):
        with new_file(file, replace=drawing.force) as partial:
            picture.save(partial, format=_FORMATS[file.suffix.lower()])


def _pair(option: str, given: Sequence[float]) -> Sequence[float]:
    if len(given) != 2:
        raise ArgumentError(f"{option} takes two numbers", got=", ".join(f"{number:g}" for number in given))
    return given


def _single(given: Sequence[Any]) -> Any:
    """None for nothing, and one thing by itself: that is for all prompts, where a list has one for each."""
    return (given[0] if len(given) == 1 else list(given)) if given else None


def grid(pictures: Sequence[Any]) -> Any:
    """Pictures of one size in a square-ish grid, on white; a single one is returned as it is."""
    from PIL import Image

    if len(pictures) == 1:
        return pictures[0]
    columns = ceil(sqrt(len(pictures)))
    rows = ceil(len(pictures) / columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * (width + _GAP), number // columns * (height + _GAP)))
    return sheet
