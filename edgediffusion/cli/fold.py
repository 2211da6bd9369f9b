from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, json_option, output_option, steps_option
from edgediffusion.registry import names


@click.command()
@bundle_argument
@steps_option
@click.option("--sampler", default=None, help=f"One of: {', '.join(names('runtimes.samplers'))}; the bundle says by default.")
@output_option("BUNDLE", "The folder to write; it must not exist.")
@json_option
def command(bundle: Path, steps: int | None, sampler: str | None, output: Path, as_json: bool) -> None:
    """Replace a BUNDLE's time embedding by a table of what it gives.

    The new bundle draws the same pictures, with the time steps of this sampler and number of steps and no others.

    \b
    Example:
      edgediffusion fold bundle-int8 --steps 20 --sampler ddim -o bundle-folded
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import bundle_summary, show
    from edgediffusion.optimize import fold
    from edgediffusion.text import size, table

    with Progress() as progress:
        made = fold(Bundle.open(bundle), output, steps=steps, sampler=sampler, progress=progress)
    done = made.history[-1].arguments
    rows = [
        [name, g["nodes_before"], g["nodes_after"], size(g["bytes_before"]), size(g["bytes_after"]), g["values"]]
        for name, g in done["graphs"].items()
    ]
    lines = [f"{output}: folded for {done['steps']} steps of '{done['sampler']}'", ""]
    lines.append(table(["graph", "nodes", "folded", "size", "folded", "values in the table"], rows))
    for name, g in done["graphs"].items():
        if g["joined"]:
            lines.append(f"{name}: what also depends on {', '.join(g['joined'])} is computed at every step, as before")
    show({**bundle_summary(made), "folded": done}, "\n".join(lines), as_json=as_json)
