"""Where the benchmarks find the shipped pipelines, and keep their results with what made them."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import edgediffusion
from edgediffusion.profiles import machine

REFERENCE = Path(edgediffusion.__file__).parent / "reference"
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("edgediffusion", "numpy", "onnxruntime", "torch", "diffusers", "nvidia-modelopt", "onnx-ir", "onnxscript", "openvino")


def save(name: str, results: dict[str, Any]) -> None:
    """Write ``results/<name>.json`` with the command, its folders of this machine left out, the machine, the versions and the date."""
    made_by = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(map(_shared, sys.argv[1:]))}".strip(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**results, "made_by": made_by}, indent=1) + "\n", encoding="utf-8")


def _shared(argument: str) -> str:
    """``FOLDER`` and ``NAME=FOLDER`` for a path that only this machine has."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}FOLDER" if Path(value).is_absolute() else argument


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
