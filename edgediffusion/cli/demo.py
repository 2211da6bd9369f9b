from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import json_option, output_option


@click.command()
@output_option("FOLDER", "The folder to write; it must not exist.")
@json_option
def command(output: Path, as_json: bool) -> None:
    """Take the shipped pipeline the whole way.

    Export, calibrate, quantize, build, draw with the float and the int8 bundle, and print one table.

    \b
    Example:
      edgediffusion demo -o demo
    """
    from edgediffusion.cli._demo import demo
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show

    with Progress() as progress:
        result = demo(output, progress)
    show(result, str(result), as_json=as_json)
