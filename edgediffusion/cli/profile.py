from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, cache_option, engines_option, json_option, rebuild_option


@click.command()
@bundle_argument
@engines_option
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True, help="Timed runs of every part.")
@click.option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Runs before the first timed one.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=2, show_default=True, help="Sampling steps of the run that peak memory is read from."
)
@cache_option
@rebuild_option
@json_option
def command(bundle: Path, target: str | None, runs: int, warmup: int, steps: int, cache: str | None, rebuild: bool, as_json: bool) -> None:
    """Measure how long every part of a BUNDLE takes.

    Latency of each component and step, load time, peak memory and size, on this machine. With --cache, what a step takes then as well.

    \b
    Example:
      edgediffusion profile bundle-cpu --runs 20
    """
    from edgediffusion.cli._engines import opened
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show
    from edgediffusion.profiles import profile
    from edgediffusion.profiles.report import profile_table

    with Progress() as progress:
        found = opened(bundle, target=target, rebuild=rebuild, progress=progress)
        measured = profile(found, target=target, runs=runs, warmup=warmup, steps=steps, cache=cache, progress=progress)
    show(measured, profile_table(measured), as_json=as_json)
