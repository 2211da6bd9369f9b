from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._options import bundle_argument, guidance_option, json_option, seed_option, source_option, steps_option


@click.command()
@bundle_argument
@source_option
@click.option("--prompt", "prompts", multiple=True, help="May be given several times; a few of the pipeline's own by default.")
@steps_option
@guidance_option
@seed_option
@json_option
def command(bundle: Path, source: Path, prompts: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Compare a BUNDLE with its source.

    Tells the error of each component, and of whole pictures drawn from the same starting noise.

    \b
    Example:
      edgediffusion validate bundle --source my-pipeline --prompt "a red heart" --steps 20
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import facts, show
    from edgediffusion.export.validate import validate

    with Progress() as progress:
        report = validate(Bundle.open(bundle), source, prompts=prompts, progress=progress, **settings)
    show(report, facts(report), as_json=as_json)
