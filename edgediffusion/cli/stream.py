from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._options import (
    bundle_argument,
    engines_option,
    guidance_option,
    json_option,
    output_option,
    rebuild_option,
    seed_option,
)


@click.command()
@bundle_argument
@click.option(
    "--frames",
    required=True,
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of pictures, streamed in the order of their names.",
)
@click.option("--prompt", required=True, help="What the pictures become.")
@click.option("--negative-prompt", default="", help="What they should not; for the guidance kinds full and initialize.")
@click.option("--steps", type=click.IntRange(min=1), default=2, show_default=True, help="Steps of a frame: the rows of a call.")
@click.option("--strength", type=float, default=0.5, show_default=True, help="How far from the frames: above 0, to 1.")
@click.option("--guidance", default="none", show_default=True, help="none, full, self or initialize: see docs/streaming.md.")
@guidance_option
@click.option("--delta", type=float, default=1.0, show_default=True, help="Strength of the residual in self and initialize.")
@click.option(
    "--similarity", type=click.FloatRange(0, 1), default=None, help="Leave out frames as like the last one as this; 0.98 is usual."
)
@seed_option
@engines_option
@rebuild_option
@output_option("FOLDER", "The folder to write the pictures to; it must not exist.")
@json_option
def command(frames: Path, output: Path, similarity: float | None, as_json: bool, **options: Any) -> None:
    """Draw over frames, one call of the network each.

    BUNDLE is of a consistency model, exported with --row-timesteps.

    \b
    Example:
      edgediffusion stream bundle --frames camera --prompt "a coat" -o drawn
    """
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show
    from edgediffusion.cli._stream import draw_stream

    with Progress() as progress:
        drawn = draw_stream(frames, output, similarity=similarity, progress=progress, **options)
    text = f"{drawn.frames} frames, {drawn.repeated} of them like the one before; {drawn.frames_per_second:.1f} frames a second"
    show(drawn, text, as_json=as_json)
