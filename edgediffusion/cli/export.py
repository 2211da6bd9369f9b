from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from edgediffusion.cli._options import json_option, output_option, target_option

_DTYPES: dict[str, Literal["float32", "float16", "bfloat16"]] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _lora(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """``FILE:SCALE``, or a file alone for a scale of 1."""
    found = []
    for value in values:
        file, colon, scale = value.rpartition(":")
        try:
            found.append((file, float(scale)) if colon and file else (value, 1.0))
        except ValueError:
            found.append((value, 1.0))
    return tuple(found)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@output_option("BUNDLE", "The folder to write; it must not exist.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="fp32", show_default=True, help="Number format of the graphs.")
@click.option(
    "--keep-fp32", "keep_float32", multiple=True, metavar="MODULE", help="Stays in fp32: vae, or vae.decoder.mid_block; may be repeated."
)
@click.option("--lora", "loras", multiple=True, callback=_lora, metavar="FILE:SCALE", help="Fuse a LoRA; may be repeated.")
@click.option("--opset", type=click.IntRange(min=18), default=None, help="ONNX operator set; by default the target's newest, or 23.")
@target_option(default=None)
@click.option("--weights", type=click.Choice(["link", "copy"]), default="link", show_default=True, help="How weights get there.")
@click.option(
    "--cut",
    "cuts",
    multiple=True,
    metavar="MODULE",
    help="Also give graphs of the denoiser's parts, cut here, for caching; may be repeated.",
)
@click.option("--row-timesteps", is_flag=True, help="Let rows of a call be at different time steps: for streams.")
@json_option
def command(source: Path, output: Path, dtype: str, as_json: bool, **options: Any) -> None:
    """Export SOURCE as a bundle of ONNX graphs.

    SOURCE is a pipeline in diffusers' folder format. Its weights are not copied where the disk can share them.

    What it will take is told on stderr before the work begins.

    \b
    Example:
      edgediffusion export my-pipeline -o bundle
      edgediffusion export my-pipeline -o half --dtype fp16 --keep-fp32 vae --target jetson-orin-nano
      edgediffusion export my-pipeline -o styled --lora ink.safetensors:0.8 --lora detail.safetensors:0.5
      edgediffusion export my-pipeline -o cut --cut up_blocks.2.resnets.1
    """
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show_bundle
    from edgediffusion.export import export

    told: list[Any] = []

    def announce(estimate: Any) -> None:
        told.append(estimate)
        click.echo(estimate, err=True)

    with Progress() as progress:
        bundle = export(source, output, dtype=_DTYPES[dtype], progress=progress, announce=announce, **options)
    show_bundle(bundle, output, as_json=as_json, estimate=told[0])
