from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from edgediffusion.cli._options import json_option, output_option

_DTYPES: dict[str, Literal["float32", "float16"]] = {"fp32": "float32", "fp16": "float16"}


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@output_option("BUNDLE", "The folder to write; it must not exist.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="fp32", show_default=True, help="Number format of the graphs.")
@click.option(
    "--opset", type=click.IntRange(min=18), default=23, show_default=True, help="ONNX operator set; older engines need a lower one."
)
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
def command(source: Path, output: Path, dtype: str, cuts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Export SOURCE as a bundle of ONNX graphs.

    SOURCE is a pipeline in diffusers' folder format. Its weights are not copied where the disk can share them.

    \b
    Example:
      edgediffusion export my-pipeline -o bundle
      edgediffusion export my-pipeline -o half --dtype fp16 --weights copy
      edgediffusion export my-pipeline -o cut --cut up_blocks.2.resnets.1
    """
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show_bundle
    from edgediffusion.export import export

    with Progress() as progress:
        bundle = export(source, output, dtype=_DTYPES[dtype], cuts=cuts, progress=progress, **options)
    show_bundle(bundle, output, as_json=as_json)
