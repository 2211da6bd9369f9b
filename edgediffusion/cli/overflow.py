from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgediffusion.cli._options import bundle_argument, json_option, seed_option, steps_option


@click.command()
@bundle_argument
@click.option("--prompt", "prompts", multiple=True, default=("",), help="May be given several times; the empty one by default.")
@steps_option
@seed_option
@json_option
def command(bundle: Path, prompts: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Find the modules that would overflow in float16.

    Draws with the float32 BUNDLE, looks at every value of its graphs, and tells what to keep in float32 when the
    pipeline is exported with --dtype fp16.

    \b
    Example:
      edgediffusion overflow bundle --prompt "a red heart" --steps 10
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import facts, show
    from edgediffusion.optimize.overflow import find_overflow

    with Progress() as progress:
        found = find_overflow(Bundle.open(bundle), prompts=prompts, progress=progress, **settings)
    advice = " ".join(f"--keep-fp32 {name}" for name in found.keep) or "nothing overflows: no --keep-fp32 is needed"
    show(found, f"{facts(found)}\n\n{advice}", as_json=as_json)
