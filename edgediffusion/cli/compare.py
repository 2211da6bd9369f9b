from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._options import (
    bundle_argument,
    cache_option,
    engines_option,
    guidance_option,
    json_option,
    rebuild_option,
    seed_option,
    steps_option,
)


@click.command()
@bundle_argument
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "--prompts", type=click.File(encoding="utf-8"), default=None, help="A text file with one prompt a line; the judge's own by default."
)
@click.option("--samples", type=click.IntRange(min=2), default=256, show_default=True, help="Pictures to draw with each bundle.")
@click.option(
    "--judge", default=None, help="'fashion', or a folder with a judge.json: for the perceptual and Fréchet distances and agreement."
)
@steps_option
@guidance_option
@cache_option
@seed_option
@engines_option
@rebuild_option
@json_option
def command(
    bundle: Path, reference: Path, prompts: Iterable[str] | None, judge: str | None, rebuild: bool, as_json: bool, **settings: Any
) -> None:
    """Compare the pictures of a BUNDLE with those of a REFERENCE.

    Both draw the same prompts from the same noise. Tells how near their pictures are to each other and, with a judge, how
    near both are to real ones and to their prompts; every figure with an interval. --cache is for the BUNDLE alone.

    \b
    Example:
      edgediffusion compare bundle-int8 bundle --prompts prompts.txt
      edgediffusion compare bundle-int8 bundle --judge fashion --samples 512
      edgediffusion compare bundle bundle --cache deepcache:interval=3 --prompts prompts.txt
    """
    from edgediffusion.cli._engines import opened
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._prompts import read_prompts
    from edgediffusion.cli._show import show
    from edgediffusion.profiles import judges
    from edgediffusion.profiles.quality import compare
    from edgediffusion.profiles.quality_table import quality_table

    lines = None if prompts is None else read_prompts(prompts)
    loaded = None if judge is None else judges.load(judge)
    with Progress() as progress:
        pair = [opened(path, target=settings["target"], rebuild=rebuild, progress=progress) for path in (bundle, reference)]
        quality = compare(*pair, prompts=lines, judge=loaded, progress=progress, **settings)
    for warning in () if quality.run is None else quality.run.warnings:
        click.echo(f"Warning: {warning}", err=True)
    show(quality, quality_table(quality), as_json=as_json)
