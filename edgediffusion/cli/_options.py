"""Arguments that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edgediffusion.registry import names

_F = TypeVar("_F", bound=Callable[..., Any])

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
engines_option = click.option("--target", default=None, help="Which of the bundle's engines to run: a target, 'auto', or 'onnx'.")
rebuild_option = click.option(
    "--rebuild", is_flag=True, help="Build engines that do not fit what is here anew first; the bundle is replaced by one with those."
)
source_option = click.option(
    "--source", required=True, type=click.Path(path_type=Path), help="The diffusers folder that the bundle was exported from."
)
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the starting noise.")
steps_option = click.option(
    "--steps", type=click.IntRange(min=1), default=None, help="Sampling steps; the bundle says how many by default."
)
guidance_option = click.option(
    "--guidance-scale", type=click.FloatRange(min=0), default=None, help="How strongly the prompt pulls; the bundle says by default."
)


cache_option = click.option(
    "--cache",
    default=None,
    metavar="POLICY",
    help=f"One of: {', '.join(names('runtimes.caching'))}; may end in options, as fora:interval=3.",
)


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """The callback of an option that takes numbers with commas between them."""
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"'{value}' is not a list of numbers with commas between them.", ctx, param) from None


def output_option(metavar: str, what: str) -> Callable[[_F], _F]:
    return click.option("-o", "--output", required=True, metavar=metavar, type=click.Path(path_type=Path), help=what)


def target_option(**settings: Any) -> Callable[[_F], _F]:
    return click.option("--target", help="A name that 'edgediffusion targets' lists, a file that ends in .toml, or 'auto'.", **settings)
