from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._options import bundle_argument, guidance_option, json_option, output_option, seed_option, source_option
from edgediffusion.registry import names


@click.command()
@bundle_argument
@source_option
@click.option(
    "--strategy", default="uniform", show_default=True, help=f"How items spread over steps: {', '.join(names('optimize.calibration'))}."
)
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Inputs of the denoiser to keep.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Sampling steps of each trajectory.")
@click.option("--sampler", default=None, help=f"One of: {', '.join(names('runtimes.samplers'))}; the bundle says by default.")
@click.option(
    "--prompts", type=click.File(encoding="utf-8"), default=None, help="A text file with one prompt a line, '-' for standard input."
)
@guidance_option
@seed_option
@output_option("STATE", "The file to write; it must not exist.")
@json_option
def command(bundle: Path, prompts: Iterable[str] | None, output: Path, as_json: bool, **settings: Any) -> None:
    """Measure the ranges of a BUNDLE's layers.

    They are measured along real sampling trajectories of the pipeline that the bundle was exported from.

    \b
    Example:
      edgediffusion calibrate bundle --source my-pipeline --samples 128 -o state.json
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show
    from edgediffusion.optimize import calibrate

    lines = None if prompts is None else tuple(filter(None, map(str.strip, prompts)))
    with Progress() as progress:
        state = calibrate(Bundle.open(bundle), output=output, prompts=lines, progress=progress, **settings)
    found = {"state": output, "digest": state.digest, "layers": len(state.layers), "calibration": state.calibration}
    show(found, f"{output}: ranges of {len(state.layers)} layers", as_json=as_json)
