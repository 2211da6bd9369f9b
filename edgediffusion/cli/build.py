from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, json_option, output_option, target_option


@click.command()
@bundle_argument
@target_option(required=True)
@output_option("BUNDLE", "The folder to write; it must not exist.")
@json_option
def command(bundle: Path, target: str, output: Path, as_json: bool) -> None:
    """Compile a BUNDLE's graphs into engines for a target.

    \b
    Example:
      edgediffusion build bundle --target cpu-x86-64 -o bundle-cpu
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show_bundle
    from edgediffusion.runtimes.build import build

    with Progress() as progress:
        made = build(Bundle.open(bundle), output, target=target, progress=progress)
    show_bundle(made, output, as_json=as_json)
