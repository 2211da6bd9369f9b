from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._options import (
    bundle_argument,
    cache_option,
    engines_option,
    guidance_option,
    json_option,
    numbers,
    output_option,
    seed_option,
)
from edgediffusion.registry import names


@click.command()
@bundle_argument
@click.option("--prompt", "prompts", required=True, multiple=True, help="What the picture shows; may be given several times.")
@click.option("--negative-prompt", default="", help="What it should not show.")
@click.option("--steps", "num_inference_steps", type=click.IntRange(min=1), default=None, help="The bundle says by default.")
@click.option("--timesteps", callback=numbers, default=None, metavar="T,T,...", help="Training timesteps, one a step, instead of --steps.")
@click.option("--sampler", default=None, help=f"One of: {', '.join(names('runtimes.samplers'))}; may end in options, as ddim:eta=0.5.")
@click.option("--spacing", default=None, help=f"One of: {', '.join(names('runtimes.spacings'))}; the bundle says by default.")
@guidance_option
@click.option(
    "--guidance-rescale", type=click.FloatRange(0, 1), default=0.0, help="Bring a strongly guided picture's contrast back; 0.7 is usual."
)
@click.option("--guidance-interval", callback=numbers, default=None, metavar="LOW,HIGH", help="Guide between these noise levels only.")
@click.option(
    "--dynamic-threshold", callback=numbers, default=None, metavar="QUANTILE[,MOST]", help="For networks that draw pixels in -1..1."
)
@click.option("--height", type=click.IntRange(min=1), default=None, help="Pixels; the bundle says how many by default.")
@click.option("--width", type=click.IntRange(min=1), default=None, help="Pixels; the bundle says how many by default.")
@click.option(
    "--images", "num_images", type=click.IntRange(min=1), default=1, show_default=True, help="How many pictures to draw of each prompt."
)
@click.option(
    "--layout", type=click.Choice(["grid", "files"]), default="grid", show_default=True, help="Several pictures in one, or numbered files."
)
@click.option(
    "--correction", default=None, metavar="FILE|qncd", help="Statistics that 'edgediffusion correct' wrote, or qncd, which has none."
)
@cache_option
@seed_option
@engines_option
@output_option("IMAGE", "The picture to write: .png, .jpg or .webp.")
@click.option("--force", is_flag=True, help="Replace pictures that exist.")
@json_option
def command(output: Path, layout: str, force: bool, as_json: bool, **options: Any) -> None:
    """Draw a picture with a BUNDLE.

    \b
    Example:
      edgediffusion run bundle-cpu --prompt "a red heart" --steps 20 --seed 7 -o heart.png
    """
    from edgediffusion.cli._draw import Drawing, draw
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show

    with Progress() as progress:
        drawn = draw(drawing=Drawing(output, layout, force), progress=progress, **options)
    for warning in drawn.warnings:
        click.echo(f"Warning: {warning}", err=True)
    show(drawn, "\n".join(drawn.files), as_json=as_json)
