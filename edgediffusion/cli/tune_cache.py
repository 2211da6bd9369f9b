from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._options import (
    bundle_argument,
    engines_option,
    guidance_option,
    json_option,
    rebuild_option,
    seed_option,
    steps_option,
)
from edgediffusion.registry import names


@click.command("tune-cache")
@bundle_argument
@click.option(
    "--prompts", required=True, type=click.File(encoding="utf-8"), help="A text file with one prompt a line, '-' for standard input."
)
@click.option(
    "--quality", "quality_db", type=float, default=30.0, show_default=True, help="PSNR in dB that nine of ten pictures shall reach."
)
@click.option("--samples", type=click.IntRange(min=1), default=8, show_default=True, help="Pictures to draw with each policy.")
@click.option(
    "--policy", "policies", multiple=True, metavar="POLICY", help="Try this one alone; several times for several. All that suit by default."
)
@steps_option
@click.option("--sampler", default=None, help=f"One of: {', '.join(names('runtimes.samplers'))}; the bundle says by default.")
@guidance_option
@seed_option
@engines_option
@rebuild_option
@click.option(
    "-o",
    "--output",
    default=None,
    metavar="IMAGE",
    type=click.Path(path_type=Path),
    help="A picture of how much changes from step to step.",
)
@json_option
def command(bundle: Path, prompts: Iterable[str], output: Path | None, rebuild: bool, as_json: bool, **settings: Any) -> None:
    """Find the caching policy that suits a BUNDLE.

    Draws your prompts without a cache and with every policy that fits the bundle's cuts, and tells what each spares and how
    near its pictures stay. The last line is what to give to --cache.

    \b
    Example:
      edgediffusion tune-cache bundle --prompts prompts.txt --quality 35 -o changes.png
    """
    from edgediffusion.cli._changes import check_output, tuned_text, write_changes
    from edgediffusion.cli._engines import opened
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._prompts import read_prompts
    from edgediffusion.cli._show import show
    from edgediffusion.profiles.tune_cache import tune_cache

    lines = read_prompts(prompts)
    check_output(output)
    with Progress() as progress:
        subject = opened(bundle, target=settings["target"], rebuild=rebuild, progress=progress)
        found = tune_cache(subject, lines, progress=progress, **settings)
    if output is not None:
        write_changes(found.changes, output)
    show(found, tuned_text(found), as_json=as_json)
