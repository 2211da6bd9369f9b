from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._errors import CANCELLED
from edgediffusion.cli._options import bundle_argument, cache_option, guidance_option, json_option, output_option, seed_option
from edgediffusion.registry import names


def _options(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE`` texts as a mapping; the strategy knows which names and values it takes."""
    pairs = [text.partition("=") for text in given]
    if bad := [text for text, (name, equals, _) in zip(given, pairs, strict=True) if not (name and equals)]:
        raise click.BadParameter(f"an option of a strategy is written NAME=VALUE. Got: '{bad[0]}'.")
    found = [name for name, _, _ in pairs]
    if twice := [name for name in found if found.count(name) > 1]:
        raise click.BadParameter(f"the option '{twice[0]}' is given twice.")
    return {name: value for name, _, value in pairs}


@click.command()
@bundle_argument
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    default=None,
    help="The diffusers folder that the bundle was exported from. With it, layers are observed in torch, as recipes need that learn.",
)
@click.option(
    "--recipe",
    default="int8",
    show_default=True,
    help=f"Number formats and methods, one of: {', '.join(names('optimize.recipes', '.toml'))}; or a TOML file.",
)
@click.option(
    "--strategy", default="uniform", show_default=True, help=f"How items spread over steps: {', '.join(names('optimize.calibration'))}."
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_options,
    help="Of the strategy; may be given several times.",
)
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Inputs of the denoiser to keep.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Sampling steps of each trajectory.")
@click.option("--sampler", default=None, help=f"One of: {', '.join(names('runtimes.samplers'))}; the bundle says by default.")
@click.option(
    "--prompts",
    type=click.File(encoding="utf-8"),
    default=None,
    help="A text file with one prompt a line, '-' for standard input; by default prompts.txt in the source or the bundle.",
)
@guidance_option
@cache_option
@seed_option
@output_option("STATE", "The folder to write; it must not exist.")
@json_option
def command(bundle: Path, prompts: Iterable[str] | None, output: Path, as_json: bool, **settings: Any) -> None:
    """Find how to quantize a BUNDLE's layers.

    What they see is measured along real sampling trajectories of the pipeline that the bundle was exported from: in the bundle's own
    graph, without torch, or in the source's network. A run that is stopped goes on from its finished parts when the same command is
    given again.

    \b
    Example:
      edgediffusion calibrate bundle --prompts prompts.txt --recipe int8 --samples 128 -o state
      edgediffusion calibrate bundle --source my-pipeline --recipe w4a8 -o state-4
      edgediffusion calibrate bundle --source my-pipeline --strategy ndtc --option variant=paper -o paper
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show
    from edgediffusion.errors import Cancelled
    from edgediffusion.optimize import calibrate

    lines = None if prompts is None else _lines(prompts)
    told: list[str] = []
    try:
        with Progress() as progress:
            state = calibrate(Bundle.open(bundle), output=output, prompts=lines, tell=told.append, progress=progress, **settings)
    except Cancelled as stopped:  # told apart from other commands, of which nothing is kept
        click.echo(str(stopped), err=True)
        raise click.exceptions.Exit(CANCELLED) from None
    finally:
        for line in told:
            click.echo(line, err=True)
    found = {"state": output, "digest": state.digest, "layers": len(state.layers), "calibration": state.calibration}
    show(found, f"{output}: {len(state.layers)} layers for the recipe {state.recipe['name']}", as_json=as_json)


def _lines(prompts: Iterable[str]) -> tuple[str, ...]:
    from edgediffusion.errors import ArgumentError

    try:
        return tuple(filter(None, map(str.strip, prompts)))
    except UnicodeDecodeError as error:
        raise ArgumentError(f"The file of prompts is not text in UTF-8: {error}", do="Save it as UTF-8.") from None
