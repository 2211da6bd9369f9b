from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, json_option, output_option, target_option


@click.command()
@bundle_argument
@target_option(required=True)
@click.option(
    "--shapes",
    metavar="AXIS=MIN:USUAL:MAX,...",
    default="",
    help="Sizes to build for, where the engine is made for sizes; by default the bundle's own, and one or two pictures.",
)
@output_option("KIT.tar", "The file to write; it must not exist.")
@json_option
def command(bundle: Path, target: str, shapes: str, output: Path, as_json: bool) -> None:
    """Pack a BUNDLE for a device that builds its engines itself.

    The tar has graphs that the device's engine reads, weights, the runtime, golden outputs, and a script that checks the
    device, builds, verifies and measures there.

    \b
    Example:
      edgediffusion kit bundle-int8 --target jetson-orin-nano -o kit.tar
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show
    from edgediffusion.export.kit import kit
    from edgediffusion.runtimes.kit import DOOR
    from edgediffusion.text import size, table

    with Progress() as progress:
        made = kit(Bundle.open(bundle), output, target=target, shapes=shapes, progress=progress)
    rows = [(name, golden.precision, f"{golden.tolerance:g}") for name, golden in made.golden.items()]
    text = (
        f"{output}: {size(made.bytes)} for {made.target}, graphs of opset {made.opset}\n\n"
        + table(("component", "precision", "may be off by"), rows)
        + f"\n\non the device: tar xf {output.name} && cd {output.stem} && python3 {DOOR}"
    )
    show(made, text, as_json=as_json)
