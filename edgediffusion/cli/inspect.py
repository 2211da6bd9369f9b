from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, json_option


@click.command()
@bundle_argument
@click.option("--quick", is_flag=True, help="Do not compare the files with their hashes.")
@json_option
def command(bundle: Path, quick: bool, as_json: bool) -> None:
    """Show what is in a BUNDLE.

    Every file is first compared with the hash that was written with it.

    \b
    Example:
      edgediffusion inspect bundle
      edgediffusion inspect bundle --json --quick
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._inspect import content, text
    from edgediffusion.cli._show import show

    opened = Bundle.open(bundle, verify=not quick)
    show(content(opened), text(opened), as_json=as_json)
