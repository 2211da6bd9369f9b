from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgediffusion.cli._options import bundle_argument, json_option, output_option, target_option

if TYPE_CHECKING:
    from edgediffusion.bundle import Bundle


@click.command()
@bundle_argument
@target_option(required=True)
@click.option("--precision", default=None, help="What float layers are computed in, where the engine lets one choose: float32, bfloat16.")
@click.option(
    "--shapes",
    metavar="AXIS=MIN:USUAL:MAX,...",
    default="",
    help="Sizes to build for, where the engine is made for sizes; by default the bundle's own, and one or two pictures.",
)
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Processor threads; all that this process may use by default.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="A file in which TensorRT keeps what kernels took, so that the next build asks again for new ones only.",
)
@click.option(
    "--pick",
    type=click.Choice(["order", "measured"]),
    default="order",
    show_default=True,
    help="The target's first engine, or for each component the one that is fastest here.",
)
@click.option(
    "--max-error",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="How far off, relative to the ONNX file, the outputs of an engine that is picked by measuring may be.",
)
@click.option(
    "--reuse",
    metavar="BUNDLE",
    type=click.Path(path_type=Path),
    default=None,
    help="An earlier output of build: engines of it that would come out the same are taken as they are.",
)
@output_option("BUNDLE", "The folder to write; it must not exist.")
@json_option
def command(bundle: Path, output: Path, target: str, pick: str, reuse: Path | None, as_json: bool, **options: Any) -> None:
    """Compile a BUNDLE's graphs into engines for a target.

    \b
    Example:
      edgediffusion build bundle --target cpu-x86-64 -o bundle-cpu
      edgediffusion build bundle --target openvino-cpu --precision bfloat16 -o bundle-openvino
      edgediffusion build bundle --target auto --pick measured -o bundle-here
      edgediffusion build bundle --target rtx-4090 --shapes batch=1:2:4,height=64,width=64 -o bundle-rtx
      edgediffusion build bundle-2 --target rtx-4090 --reuse bundle-rtx -o bundle-2-rtx
    """
    from edgediffusion import targets
    from edgediffusion.bundle import Bundle
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show_bundle
    from edgediffusion.runtimes.build import build

    replaced = f"engines/{targets.load(target).name}/"  # may be damaged: that is a reason to build
    source = Bundle.open(bundle, skip=replaced)
    earlier = None if reuse is None else Bundle.open(reuse, skip=replaced)  # what is taken of them is checked then
    with Progress() as progress:
        made = build(source, output, target=target, pick=pick, reuse=earlier, progress=progress, **options)
    if reuse is not None and not as_json:
        taken = made.history[-1].arguments.get("reused", ())
        click.echo(f"Taken from {reuse}: {', '.join(taken) or 'nothing'}; built: {_others(made, taken) or 'nothing'}")
    if pick == "measured" and not as_json:
        click.echo(_trials(made) + "\n")
    show_bundle(made, output, as_json=as_json)


def _others(made: Bundle, taken: Collection[str]) -> str:
    return ", ".join(c.name for c in made.components if c.name not in taken)


def _trials(made: Bundle) -> str:
    """What each engine that came into question took, and which one was chosen; with --json it is in engine.json."""
    from edgediffusion.runtimes import engine_manifest
    from edgediffusion.text import table

    manifest = engine_manifest.read(made, made.history[-1].arguments["target"])
    rows = [
        (
            trial["component"],
            trial["engine"],
            trial["precision"],
            f"{trial['median_ms']:.2f}" if trial["median_ms"] else "",
            f"{trial['error']:.2g}" if trial["median_ms"] else "",
            "chosen" if trial["chosen"] else trial["refused"],
        )
        for trial in manifest.trials
    ]
    return table(("component", "engine", "precision", "median ms", "error", ""), rows)
