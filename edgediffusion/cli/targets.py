from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgediffusion.cli._options import json_option

if TYPE_CHECKING:
    from edgediffusion.targets import Target


@click.command()
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the devices that are known, or what is known of one.

    NAME may also be a file that ends in .toml, or 'auto' for this machine. A figure with a '?' is one that no public page
    confirmed; docs/targets.md says how to write a target of your own.

    \b
    Example:
      edgediffusion targets
      edgediffusion targets jetson-orin-nano
    """
    from edgediffusion import targets
    from edgediffusion.cli._show import show
    from edgediffusion.text import table

    if name is not None:
        target = targets.load(name)
        show(target, _text(target), as_json=as_json)
        return
    known = [targets.load(name) for name in targets.names()]
    head = ("target", "engines", "formats", "opset", "memory GB", "GB/s", "int8 TOPS", "16-bit TFLOPS", "SM", "W")
    show(known, table(head, [_row(t) for t in known]), as_json=as_json)


def _text(target: Target) -> str:
    """One line for each thing it says, with the page that says so."""
    from edgediffusion import targets
    from edgediffusion.cli._show import plain
    from edgediffusion.text import table

    said = {key: value for key, value in plain(target).items() if key not in ("name", "sources", "unverified", "facts") and value}
    rows = []
    for key, value in said.items():
        entries = {f"{key}.{part}": figure for part, figure in value.items()} if isinstance(value, dict) else {key: value}
        for entry, figure in entries.items():
            doubtful = key in targets.SOURCED and {entry, key} & set(target.unverified)
            source = "unverified" if doubtful else target.sources.get(entry, target.sources.get(key, ""))
            words = [f"{k} {v}" for k, v in figure.items()] if isinstance(figure, dict) else figure
            rows.append((entry.replace("_", " "), ", ".join(map(str, words)) if isinstance(words, list) else words, source))
    notes = [f"{fact.about}: {fact.text} ({fact.source})" for fact in target.facts]
    return "\n".join([target.name, "", table(("what", "value", "source"), rows), *(["", *notes] if notes else [])])


def _row(target: Target) -> tuple[object, ...]:
    def told(key: str, value: object, part: str = "") -> str:
        doubtful = key in target.unverified or f"{key}.{part}" in target.unverified
        return "" if not value else f"{value:g}{'?' if doubtful else ''}" if isinstance(value, (int, float)) else f"{value}"

    half = "float16" if "float16" in target.peak_tops else "bfloat16"
    return (
        target.name,
        ", ".join(target.engines),
        ", ".join(target.formats),
        target.opset,
        told("memory_gb", target.memory_gb),
        told("bandwidth_gb_s", target.bandwidth_gb_s),
        told("peak_tops", target.peak_tops.get("int8"), "int8"),
        told("peak_tops", target.peak_tops.get(half), half),
        target.compute_capability.replace(".", ""),
        told("power_modes_w", max(target.power_modes_w, default=0)),
    )
