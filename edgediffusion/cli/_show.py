"""Results on stdout: as JSON when it was asked for, otherwise as text for a person."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgediffusion.bundle import Bundle
from edgediffusion.text import size, table


def show(value: Any, text: str, *, as_json: bool) -> None:
    click.echo(json.dumps(plain(value), indent=1, ensure_ascii=False) if as_json else text)


def plain(value: Any) -> Any:
    """``value`` made of what JSON knows; dataclasses become objects, paths and other things their text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return value.item() if hasattr(value, "item") else str(value)  # NumPy's scalars


def facts(record: Any) -> str:
    """A dataclass as text: its plain fields one a line, then every field that is a sequence of records as a table."""
    content = {name.replace("_", " "): value for name, value in plain(record).items()}
    tables = {name: rows for name, rows in content.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)}
    lines = [f"{name}: {_brief(value)}" for name, value in content.items() if name not in tables]
    for name, rows in tables.items():
        lines += ["", name, table([k.replace("_", " ") for k in rows[0]], [[_brief(v) for v in row.values()] for row in rows])]
    return "\n".join(lines).strip()


def _brief(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def bundle_summary(bundle: Bundle) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "family": bundle.family,
        "components": [c.name for c in bundle.components],
        "targets": list(bundle.targets),
        "bytes": bundle.size_bytes(),
        "digest": bundle.digest,
    }


def show_bundle(bundle: Bundle, path: Path, *, as_json: bool, **beside: Any) -> None:
    """What a verb made: one line, or its summary as JSON, with what else is to be said ``beside``."""
    names = ", ".join(c.name for c in bundle.components)
    show({**bundle_summary(bundle), **beside}, f"{path}: {names}; {size(bundle.size_bytes())}", as_json=as_json)
