from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, json_option, output_option, target_option
from edgediffusion.registry import names


@click.command()
@bundle_argument
@click.option("--state", required=True, type=click.Path(path_type=Path), help="The folder that 'edgediffusion calibrate' wrote.")
@click.option(
    "--source",
    default=None,
    type=click.Path(path_type=Path),
    help="The diffusers folder that the bundle was exported from. Without it a graph is run for every layer.",
)
@click.option(
    "--recipe",
    default=None,
    help=f"One of: {', '.join(names('optimize.recipes', '.toml'))}; or a TOML file; by default the one that the state was made for.",
)
@target_option(default="cpu-x86-64", show_default=True)
@click.option("--max-error", type=float, default=None, help="Keep as few layers float as hold this error of the prediction, such as 0.02.")
@click.option(
    "--max-latency", type=float, default=None, help="Keep as many layers float as this part of the float step's time allows, such as 0.8."
)
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="Inputs of the denoiser to measure errors on.")
@click.option("--runs", type=click.IntRange(min=1), default=40, show_default=True, help="Timed runs of every graph.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Threads of the engine; all cores by default.")
@click.option(
    "--prompts",
    type=click.File(encoding="utf-8"),
    default=None,
    help="A text file with one prompt a line, '-' for standard input; by default prompts.txt in the source.",
)
@output_option("REPORT", "The file to write; it must not exist.")
@json_option
def command(
    bundle: Path,
    state: Path,
    source: Path | None,
    recipe: str | None,
    target: str,
    max_error: float | None,
    max_latency: float | None,
    samples: int,
    runs: int,
    threads: int | None,
    prompts: Iterable[str] | None,
    output: Path,
    as_json: bool,
) -> None:
    """Find which layers of a BUNDLE should stay float.

    Every layer's error and its time on this machine are measured, float and quantized. A layer stays float that is slower or
    much worse when quantized, or as a bound asks. 'edgediffusion quantize --sensitivity' takes the report.

    \b
    Example:
      edgediffusion sensitivity bundle --state state --source my-pipeline -o sensitivity.json
      edgediffusion sensitivity bundle --state state --source my-pipeline --max-error 0.02 -o sensitivity.json
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._prompts import read_prompts
    from edgediffusion.cli._show import show
    from edgediffusion.optimize.sensitivity import Request, sensitivity

    request = Request(samples, runs, None if prompts is None else read_prompts(prompts), threads)
    with Progress() as progress:
        found = sensitivity(
            Bundle.open(bundle),
            state,
            output,
            source=source,
            recipe=recipe,
            target=target,
            max_error=max_error,
            max_latency=max_latency,
            request=request,
            progress=progress,
        )
    show(found, f"{output}: {found.component}, recipe {found.recipe}, target {found.target}\n\n{found.text()}", as_json=as_json)
