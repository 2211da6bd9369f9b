"""A folder of frames through a stream, into a new folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgediffusion.cli._engines import opened
from edgediffusion.errors import ArgumentError
from edgediffusion.files import new_folder

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Streamed:
    """``repeated`` frames were like the one before, and got the picture that was shown then. The rate counts reading and writing."""

    output: str
    frames: int
    repeated: int
    frames_per_second: float


def draw_stream(
    frames: Path,
    output: Path,
    *,
    bundle: Path,
    prompt: str,
    similarity: float | None,
    target: str | None,
    rebuild: bool,
    progress: Callable[[str, float], None],
    **options: Any,
) -> Streamed:
    """A picture for every frame, under its name and as PNG.

    Raises:
        ArgumentError: no frames, two of one name, a value that cannot be used. OutputError: the folder exists. BundleError: see ``Stream``.
    """
    from edgediffusion.runtimes import Pipeline
    from edgediffusion.runtimes.images import open_image, to_images
    from edgediffusion.runtimes.streaming import Frame, Stream
    from edgediffusion.runtimes.streaming.filter import SimilarityFilter

    found = _frames(frames)
    with new_folder(output) as folder:
        pipeline = Pipeline.from_bundle(opened(bundle, target=target, rebuild=rebuild, progress=progress), target=target)
        alike = None if similarity is None else SimilarityFilter(similarity, seed=options["seed"])
        stream = Stream(pipeline, prompt, similarity=alike, **options)

        def save(frame: Frame, name: str) -> None:
            to_images(frame.pixels[None])[0].save(folder / f"{name}.png")

        started, repeated = time.perf_counter(), 0
        for at, file in enumerate(found):
            progress("streaming", at / len(found))
            frame = stream(open_image(file))
            if frame is not None:
                repeated += frame.repeated
                save(frame, file.stem if frame.repeated else found[frame.index].stem)
        for frame in stream.drain():
            save(frame, found[frame.index].stem)
        progress("streaming", 1.0)
    return Streamed(str(output), len(found), repeated, len(found) / (time.perf_counter() - started))


def _frames(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not found:
        raise ArgumentError(f"'{folder}' has no frames", allowed=f"files that end in {', '.join(_SUFFIXES)}")
    names = [file.stem for file in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArgumentError(f"Frames of '{folder}' have one name but for their ending", got=", ".join(twice[:5]))
    return found
