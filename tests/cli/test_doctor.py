from __future__ import annotations

import json
import re
from importlib import metadata
from typing import Any

import pytest
from click.testing import CliRunner

from edgediffusion.cli import _doctor, main

WITHOUT = {"torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx-cu13", "onnxruntime-gpu"}


def doctor() -> dict[str, Any]:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.output)
    return answer


def test_every_package_that_an_extra_brings_is_looked_for() -> None:
    tools = {"pytest", "pytest-xdist", "mypy", "ruff", "import-linter", "peft", "edgediffusion", "tomli"}
    wanted = {re.match(r"[\w-]+", line)[0] for line in metadata.requires("edgediffusion") or []}
    assert wanted - tools <= {piece["package"] for piece in doctor()["pieces"]}


def test_what_is_installed_has_its_version_and_what_is_missing_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package in WITHOUT:
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(_doctor.metadata, "version", version)
    answer = doctor()
    pieces = {piece["package"]: piece for piece in answer["pieces"]}
    assert pieces["numpy"]["installed"] == real("numpy")
    assert pieces["numpy"]["fits"] is True
    assert pieces["torch"] == {
        "package": "torch",
        "wanted": pieces["torch"]["wanted"],
        "installed": None,
        "fits": False,
        "purpose": "exports and calibrates pipelines",
        "get": "pip install 'edgediffusion[export]'",
    }
    assert answer["advice"] == ["No engine is installed, so nothing can run. Begin with: pip install 'edgediffusion[cpu]'"]
    text = CliRunner().invoke(main, ["doctor"]).output
    assert "pip install 'edgediffusion[export]'" in text
    assert "missing" in text


def test_a_version_out_of_range_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(_doctor.metadata, "version", lambda package: "0.0.1" if package == "pillow" else real(package))
    assert any(line.startswith("pillow 0.0.1 is outside >=10") for line in doctor()["advice"])


def test_the_machine_is_described() -> None:
    machine = doctor()["machine"]
    assert 0 < machine["cores_allowed"] <= machine["cores"]
    assert 0 < machine["memory_allowed_bytes"] <= machine["memory_bytes"]
    assert machine["disk_free_bytes"] > 0
    assert machine["target"] == "cpu-x86-64"


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0", ">=2.13,<2.14", True),
        ("2.13.0+cpu", "<2.14,>=2.13", True),
        ("2.14.0", ">=2.13,<2.14", False),
        ("2.9", ">=2.13", False),
        ("1.0", "", True),
        ("8.1", ">=8.1", True),
        ("8.1.0", "==8.1", True),
        ("8.1", "!=8.1", False),
        ("10.16.0.72", ">=10.3", True),
        ("1.0rc1", ">=1.0", True),
        ("1.0", "~=1.0", False),
    ],
)
def test_ranges(version: str, wanted: str, fits: bool) -> None:
    assert _doctor.in_range(version, wanted) is fits
