from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._options import bundle_argument, guidance_option, json_option, output_option, seed_option, steps_option
from edgediffusion.registry import names


@click.command()
@bundle_argument
@click.option("--reference", required=True, type=click.Path(path_type=Path), help="The float bundle that BUNDLE was quantized from.")
@click.option(
    "--method", default="ptqd", show_default=True, help=f"One of: {', '.join(names('runtimes.corrections'))}; qncd needs no measurement."
)
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method; may be given several times.")
@click.option("--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Pictures to draw.")
@steps_option
@click.option("--sampler", default=None, help=f"One of: {', '.join(names('runtimes.samplers'))}; the bundle says by default.")
@click.option(
    "--prompts", required=True, type=click.File(encoding="utf-8"), help="A text file with one prompt a line, '-' for standard input."
)
@guidance_option
@seed_option
@output_option("STATISTICS", "The file to write; it must not exist.")
@json_option
def command(bundle: Path, reference: Path, prompts: Iterable[str], options: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Measure what quantization does to a BUNDLE's predictions.

    'edgediffusion run --correction' then takes it out of them, for the sampler, steps and guidance that are given here.

    \b
    Example:
      edgediffusion correct bundle-int8 --reference bundle --method ptqd --prompts prompts.txt -o ptqd.json
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._prompts import read_prompts
    from edgediffusion.cli._show import show
    from edgediffusion.optimize.correct import correct
    from edgediffusion.text import table

    for text in options:
        if "=" not in text:
            raise click.BadParameter(f"'{text}' is not of the form NAME=VALUE.", param_hint="--option")
    chosen = dict(text.split("=", 1) for text in options)
    with Progress() as progress:
        found = correct(
            Bundle.open(bundle), Bundle.open(reference), prompts=read_prompts(prompts), options=chosen, progress=progress, **settings
        )
    rms = found.measurement["rms"]
    rows = [[i, *(f"{rms[key][i]:.4f}" for key in ("prediction", "error", "corrected"))] for i in range(found.deployment.steps)]
    answer = {"statistics": settings["output"], "digest": found.digest, "method": found.method, "options": found.options, "rms": rms}
    head = ["step", "prediction (rms)", "error", "corrected"]
    show(answer, f"{settings['output']}: {found.method}\n\n{table(head, rows)}", as_json=as_json)
