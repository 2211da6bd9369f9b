from __future__ import annotations

import click

from edgediffusion.cli._options import json_option


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List the targets that engines can be built for.

    \b
    Example:
      edgediffusion targets
    """
    from edgediffusion import targets
    from edgediffusion.cli._show import show
    from edgediffusion.text import table

    known = [targets.load(name) for name in targets.names()]
    rows = [(t.name, ", ".join(t.engines), ", ".join(t.formats), t.opset, t.summary) for t in known]
    show(known, table(("target", "engines", "formats", "opset", "what"), rows), as_json=as_json)
