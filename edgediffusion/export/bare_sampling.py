"""What a sampling loop must know about a network that comes without a pipeline: from its scheduler, in diffusers' format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgediffusion.bundle import GUIDANCE, Sampling
from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export.schedule import read_scheduler
from edgediffusion.export.source import Source

_FILE = "scheduler_config.json"


def sampling_of(
    scheduler: Any, sample: Sequence[int], *, steps: int = 20, guidance: str = "none", guidance_scale: float = 1.0, sampler: str = ""
) -> Sampling:
    """The facts for a denoiser whose ``sample`` has this shape, [rows, channels, ...].

    ``scheduler`` is one of diffusers', or the path of a ``scheduler_config.json``; ``sampler`` a name of ``runtimes.samplers`` in
    place of the one that it stands for. The network draws no pictures from latents: there is no scale, and a pixel is a pixel.

    Raises:
        SourceError: the scheduler does something that no sampler here does. ArgumentError: no such guidance.
    """
    if guidance not in GUIDANCE[:2]:
        raise ArgumentError(f"No guidance is called '{guidance}'", allowed=", ".join(GUIDANCE[:2]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "scheduler").mkdir()
        kind, text = _described(scheduler)
        (Path(folder) / "scheduler" / _FILE).write_text(text, encoding="utf-8")
        found = read_scheduler(Source(Path(folder), {"_class_name": "", "scheduler": ["diffusers", kind]}))
    height, width = (sample[2], sample[3]) if len(sample) == 4 else (1, 1)
    return Sampling(
        prediction=found.prediction,
        guidance=guidance,
        schedule=found.schedule,
        latent_channels=sample[1] if len(sample) > 1 else 1,
        downsampling=1,
        latent_scale=1.0,
        latent_shift=0.0,
        height=height,
        width=width,
        size_multiple=1,
        fixed_size=False,
        sampler=sampler or found.sampler,
        steps=steps,
        guidance_scale=guidance_scale,
    )


def _described(scheduler: Any) -> tuple[str, str]:
    """The class of a scheduler and its configuration as JSON."""
    if not isinstance(scheduler, (str, Path)):
        return type(scheduler).__name__, str(scheduler.to_json_string())
    try:
        text = Path(scheduler).read_text(encoding="utf-8")
        return str(json.loads(text)["_class_name"]), text
    except (OSError, ValueError, KeyError, TypeError):
        raise SourceError(
            f"'{scheduler}' is no configuration of a scheduler", do=f"Give the {_FILE} that diffusers' save_pretrained wrote."
        ) from None
