from __future__ import annotations

import click

from edgediffusion.cli._options import json_option


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Say what is installed and what this machine has.

    For each missing piece: what it would give, and the command that gets it.

    \b
    Example:
      edgediffusion doctor
    """
    from edgediffusion.cli._doctor import examine, text
    from edgediffusion.cli._show import show

    found = examine()
    show(found, text(found), as_json=as_json)
