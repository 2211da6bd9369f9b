from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, json_option, output_option, target_option
from edgediffusion.registry import names


@click.command()
@bundle_argument
@click.option("--state", required=True, type=click.Path(path_type=Path), help="The folder that 'edgediffusion calibrate' wrote.")
@click.option(
    "--recipe",
    default=None,
    help=f"One of: {', '.join(names('optimize.recipes', '.toml'))}; or a TOML file; by default the one that the state was made for.",
)
@target_option(default="cpu-x86-64", show_default=True)
@click.option(
    "--placement",
    default=None,
    help="Where Q/DQ nodes stand, by default as the target's engine wants them. "
    f"One of: {', '.join(names('optimize.placements', '.toml'))}; or a TOML file.",
)
@click.option(
    "--sensitivity",
    default=None,
    type=click.Path(path_type=Path),
    help="A report of 'edgediffusion sensitivity': the layers that it keeps float, for its reasons.",
)
@output_option("BUNDLE", "The folder to write; it must not exist.")
@json_option
def command(
    bundle: Path, state: Path, recipe: str | None, target: str, placement: str | None, sensitivity: Path | None, output: Path, as_json: bool
) -> None:
    """Give a BUNDLE's graphs the number formats of a recipe.

    The target says where its engine wants them quantized.

    \b
    Example:
      edgediffusion quantize bundle --state state --target cpu-x86-64 -o bundle-int8
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show_bundle
    from edgediffusion.optimize import quantize

    with Progress() as progress:
        made = quantize(
            Bundle.open(bundle),
            state,
            output,
            recipe=recipe,
            target=target,
            placement=placement,
            sensitivity=sensitivity,
            progress=progress,
        )
    show_bundle(made, output, as_json=as_json)
