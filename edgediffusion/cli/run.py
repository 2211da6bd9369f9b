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
    rebuild_option,
    seed_option,
)
from edgediffusion.registry import names

_PICTURE = click.Path(exists=True, dir_okay=False, path_type=Path)

_FRACTION = click.FloatRange(0, 1, min_open=True, max_open=True)


@click.command()
@bundle_argument
@click.option("--prompt", "prompts", multiple=True, help="What the picture shows; may be given several times.")
@click.option("--prompt-2", multiple=True, help="For the second text encoder, where there are several; --prompt by default.")
@click.option("--prompt-3", multiple=True, help="For the third one.")
@click.option("--negative-prompt", default=None, help="What it should not show.")
@click.option("--negative-prompt-2", default=None, help="For the second text encoder; --negative-prompt by default.")
@click.option("--negative-prompt-3", default=None, help="For the third one.")
@click.option("--prompt-weights", is_flag=True, help="Read (words:1.3), (words) and [words] in prompts as more or less of them.")
@click.option(
    "--class-label",
    "class_labels",
    type=click.IntRange(min=0),
    multiple=True,
    help="What to draw with a network of classes.",
)
@click.option("--image", "images", type=_PICTURE, multiple=True, help="Start from this picture, or from one for each prompt.")
@click.option("--mask", "masks", type=_PICTURE, multiple=True, help="Paint anew where this picture is white; the rest is kept.")
@click.option(
    "--strength", type=click.FloatRange(0, 1, min_open=True), default=None, help="How far from --image; 0.8 by default, 1 with --mask."
)
@click.option(
    "--denoising-end",
    type=_FRACTION,
    default=None,
    metavar="FRACTION",
    help="Leave what comes behind this part of the noise to another network: writes latents, a .npy file.",
)
@click.option("--denoising-start", type=_FRACTION, default=None, metavar="FRACTION", help="Begin there, with --image LATENTS.npy.")
@click.option(
    "--control-image",
    "control_images",
    type=_PICTURE,
    multiple=True,
    help="Lead a ControlNet by this picture, or by one for each prompt; for several ControlNets one for each of them.",
)
@click.option("--control-scale", "control_scales", type=float, multiple=True, help="How strongly; 1 by default. One for each ControlNet.")
@click.option(
    "--control-part", callback=numbers, default=None, metavar="START,END", help="Lead between these parts of the steps only: 0,0.5."
)
@click.option("--guess-mode", is_flag=True, help="Lead more loosely, and what the prompt asks for alone; also without one.")
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
    "--original-size", callback=numbers, default=None, metavar="H,W", help="What networks that are told sizes are told of the source."
)
@click.option(
    "--crop", "crops_coords_top_left", callback=numbers, default=None, metavar="TOP,LEFT", help="Where it was cropped; 0,0 by default."
)
@click.option(
    "--target-size", callback=numbers, default=None, metavar="H,W", help="What size it shall look like; that of the picture by default."
)
@click.option("--tile", type=click.IntRange(min=1), default=None, help="Decode in tiles of so many pixels a side, for large pictures.")
@click.option(
    "--guidance-batch", type=click.Choice(["joint", "separate"]), default="joint", show_default=True, help="separate takes less memory."
)
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
@rebuild_option
@click.option(
    "--max-memory", default=None, metavar="SIZE", help="What this may take in memory, as 6GB; says what was traded to stay within it."
)
@output_option("IMAGE", "The picture to write: .png, .jpg or .webp.")
@click.option("--force", is_flag=True, help="Replace pictures that exist.")
@json_option
def command(output: Path, layout: str, force: bool, as_json: bool, **options: Any) -> None:
    """Draw a picture with a BUNDLE.

    \b
    Example:
      edgediffusion run bundle-cpu --prompt "a red heart" --steps 20 --seed 7 -o heart.png
      edgediffusion run bundle-cpu --prompt "a gold heart" --image heart.png --strength 0.6 -o gold.png
      edgediffusion run bundle-cpu --prompt "a leaf" --image heart.png --mask left-half.png -o leaf.png
      edgediffusion run base-cpu --prompt "a fox" --steps 40 --denoising-end 0.8 -o fox.npy
      edgediffusion run refiner-cpu --prompt "a fox" --steps 40 --denoising-start 0.8 --image fox.npy -o fox.png
      edgediffusion run bundle-cpu --prompt "a room" --control-image edges.png --control-scale 0.8 -o room.png
      edgediffusion run bundle-cpu --prompt "a (red:1.4) [small] heart" --prompt-weights -o red.png
      edgediffusion run digits-cpu --class-label 3 --class-label 7 -o digits.png
      edgediffusion run bundle-cpu --prompt "a forest" --width 2048 --height 1024 --tile 512 -o wide.png
      edgediffusion run bundle-cpu --prompt "a red heart" --max-memory 6GB -o heart.png
    """
    from edgediffusion.cli._draw import Drawing, draw
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show

    with Progress() as progress:
        drawn = draw(drawing=Drawing(output, layout, force, latents=options["denoising_end"] is not None), progress=progress, **options)
    for warning in drawn.warnings:
        click.echo(f"Warning: {warning}", err=True)
    show(drawn, "\n".join(drawn.files), as_json=as_json)
