from __future__ import annotations

from pathlib import Path

import click

from edgediffusion.cli._options import json_option, output_option


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``THEIRS=OURS``, several times."""
    wrong = [value for value in values if not all(value.partition("=")[::2])]
    if wrong:
        raise click.BadParameter(f"'{wrong[0]}' is not of the form THEIRS=OURS.", ctx, param)
    return dict(value.split("=", 1) for value in values)


def _sizes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    pairs = _pairs(ctx, param, values)
    wrong = [size for size in pairs.values() if not size.isdecimal() or int(size) < 1]
    if wrong:
        raise click.BadParameter(f"'{wrong[0]}' is no size.", ctx, param)
    return {axis: int(size) for axis, size in pairs.items()}


@click.command(name="import-onnx")
@click.argument("model", type=click.Path(path_type=Path))
@output_option("BUNDLE", "The folder to write; it must not exist.")
@click.option(
    "--role",
    type=click.Choice(["denoise", "decode", "encode_image", "encode"]),
    default="denoise",
    show_default=True,
    help="What the graph is for.",
)
@click.option("--name", default="", help="Of the component; the role's by default.")
@click.option("--rename", "names", multiple=True, callback=_pairs, metavar="THEIRS=OURS", help="An input or output; may be repeated.")
@click.option("--axis", "axes", multiple=True, callback=_pairs, metavar="THEIRS=OURS", help="A free axis, by name or as tensor:place.")
@click.option("--size", "sizes", multiple=True, callback=_sizes, metavar="AXIS=N", help="Of an axis, for the run that checks the graph.")
@click.option(
    "--scheduler", type=click.Path(path_type=Path), default=None, help="A scheduler_config.json: what a denoiser was trained for."
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Sampling steps by default; 1 for a one-step model."
)
@click.option("--weights", type=click.Choice(["link", "copy"]), default="link", show_default=True, help="How weights get there.")
@json_option
def command(
    model: Path,
    output: Path,
    role: str,
    name: str,
    names: dict[str, str],
    axes: dict[str, str],
    sizes: dict[str, int],
    scheduler: Path | None,
    steps: int,
    weights: str,
    as_json: bool,
) -> None:
    """Take somebody's ONNX file as a bundle.

    MODEL gets the names that its role wants, is run once, and its weights stay in their files. A denoiser takes sample and
    timestep beside its conditions and gives out_sample: --rename says what is called so.

    \b
    Example:
      edgediffusion import-onnx policy.onnx -o bundle --rename noisy=sample --rename t=timestep --rename eps=out_sample \\
        --axis N=batch --scheduler scheduler_config.json
    """
    from edgediffusion.cli._progress import Progress
    from edgediffusion.cli._show import show_bundle
    from edgediffusion.export import import_onnx
    from edgediffusion.export.imported import Imported, sampling_for

    imported = Imported(model, role, name or role, names, axes, sizes)
    sampling = None if scheduler is None else sampling_for(imported, scheduler, steps=steps)
    with Progress() as progress:
        bundle = import_onnx([imported], output, sampling=sampling, link=weights == "link", progress=progress)
    show_bundle(bundle, output, as_json=as_json)
