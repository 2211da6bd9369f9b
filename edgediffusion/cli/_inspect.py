"""What a bundle holds, as data and as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from edgediffusion.bundle import Bundle, TensorSpec, sampling_facts
from edgediffusion.text import size, table


def content(bundle: Bundle) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "family": bundle.family,
        "digest": bundle.digest,
        "bytes": bundle.size_bytes(),
        "components": [{**asdict(c), "bytes": bundle.size_bytes(f"{c.name}/")} for c in bundle.components],
        "sampling": bundle.sampling and sampling_facts(bundle.sampling),
        "engines": {target: bundle.size_bytes(f"engines/{target}/") for target in bundle.targets},
        "history": [asdict(verb) for verb in bundle.history],
        "files": {name: asdict(file) for name, file in bundle.files.items()},
    }


def text(bundle: Bundle) -> str:
    parts = [
        f"{bundle.path}: {bundle.family}, {size(bundle.size_bytes())}, digest {bundle.digest[:12]}",
        table(("component", "role", "size"), [(c.name, c.role, size(bundle.size_bytes(f"{c.name}/"))) for c in bundle.components]),
        table(("component", "", "tensor", "type", "shape"), _tensors(bundle)),
        "tokenizers\n" + (_lines({c.name: f"{t.file}, {t.length} tokens" for c in bundle.components if (t := c.tokenizer)}) or "  none"),
        "sampling\n" + (_lines(sampling_facts(bundle.sampling)) if bundle.sampling else "  none: this bundle has no sampling loop"),
        "engines\n" + (_lines({t: size(bundle.size_bytes(f"engines/{t}/")) for t in bundle.targets}) or "  none yet: edgediffusion build"),
        "history\n" + (_lines({verb.name: _words(verb.arguments) for verb in bundle.history}) or "  none"),
    ]
    return "\n\n".join(parts)


def _tensors(bundle: Bundle) -> list[tuple[str, ...]]:
    def row(component: str, direction: str, spec: TensorSpec) -> tuple[str, ...]:
        return component, direction, spec.name, spec.dtype, " x ".join(map(str, spec.shape)) or "scalar"

    return [row(c.name, d, s) for c in bundle.components for d, specs in (("in", c.inputs), ("out", c.outputs)) for s in specs]


def _lines(values: dict[str, Any]) -> str:
    width = max(map(len, values), default=0)
    return "\n".join(f"  {name:<{width}}  {_words(value) if isinstance(value, dict) else value}" for name, value in values.items())


def _words(values: Any) -> str:
    """``a=1, b=2``; what has parts of its own is only counted, ``--json`` has it."""
    return ", ".join(f"{name}={f'({len(value)} parts)' if isinstance(value, dict) else value}" for name, value in values.items())
