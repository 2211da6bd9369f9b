from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import bundle_argument, json_option, output_option, target_option


@click.command()
@bundle_argument
@target_option(default=None)
@click.option("--opset", type=click.IntRange(17, 23), default=None, help="The ONNX operator set to write, instead of that of a target.")
@output_option("BUNDLE", "The folder to write; it must not exist.")
@json_option
def command(bundle: Path, target: str | None, opset: int | None, output: Path, as_json: bool) -> None:
    """Write a BUNDLE's graphs in an older ONNX operator set.

    For engines that read no newer one. The graphs compute the same, and weights are linked.

    \b
    Example:
      edgediffusion lower bundle --target jetson-orin-nano -o bundle-orin
      edgediffusion lower bundle-int8 --opset 17 -o bundle-17
    """
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import bundle_summary, show
    from edgediffusion.export.lower import lower
    from edgediffusion.text import table

    with Progress() as progress:
        made = lower(Bundle.open(bundle), output, target=target, opset=opset, progress=progress)
    done = made.history[-1].arguments
    rows = [
        [name, g["opset_before"], g["opset"], g["nodes_before"], g["nodes"], ", ".join(f"{op} {n}" for op, n in g["rewritten"].items())]
        for name, g in done["graphs"].items()
    ]
    text = f"{output}: in opset {done['opset']}\n\n" + table(["graph", "opset", "now", "nodes", "now", "rewritten"], rows)
    show({**bundle_summary(made), "lowered": done}, text, as_json=as_json)
