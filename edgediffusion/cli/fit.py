from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, json_option, target_option


@click.command()
@bundle_argument
@target_option(required=True)
@click.option("--height", type=click.IntRange(min=1), default=None, help="Of the picture in pixels; the bundle's own by default.")
@click.option("--width", type=click.IntRange(min=1), default=None, help="Likewise.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Sampling steps; the bundle says how many by default.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures at a time.")
@click.option("--guidance/--no-guidance", default=None, help="Whether guidance doubles the rows; the bundle says by default.")
@click.option("--max-memory", default=None, metavar="SIZE", help="What there is, as 6GB; all that the target has by default.")
@json_option
def command(
    bundle: Path,
    target: str,
    height: int | None,
    width: int | None,
    steps: int | None,
    batch: int,
    guidance: bool | None,
    max_memory: str | None,
    as_json: bool,
) -> None:
    """Say whether a BUNDLE fits a target, and how fast it should be.

    Before anything is built, from its graphs and the target's facts: memory and time of each component, of a step and of a
    picture, what would be traded until it fits, and how far such estimates were off where they were checked. A processor
    without figures in its file is measured for half a second, if it is this machine's.

    \b
    Example:
      edgediffusion fit bundle --target jetson-orin-nano
      edgediffusion fit bundle --target auto --max-memory 6GB --batch 4
    """
    from edgediffusion import targets
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show
    from edgediffusion.profiles.fit import fit
    from edgediffusion.profiles.fit_machine import processor_of
    from edgediffusion.profiles.fit_report import fit_table
    from edgediffusion.runtimes.memory import parse_bytes

    device, room = targets.load(target), None if max_memory is None else parse_bytes(max_memory)
    opened = Bundle.open(bundle, verify=False)
    with Progress() as progress:
        found = fit(
            opened,
            device,
            height=height,
            width=width,
            steps=steps,
            batch=batch,
            guidance=guidance,
            max_memory=room,
            processor=processor_of(device),
            progress=progress,
        )
    show(found, fit_table(found), as_json=as_json)
