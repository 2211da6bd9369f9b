"""What the command hands to the library, what it prints, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgediffusion.bundle import Bundle
from edgediffusion.cli import main
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize import sensitivity as library
from edgediffusion.optimize.sensitivity_plan import LayerCost
from edgediffusion.optimize.sensitivity_report import Point, Sensitivity

FOUND = Sensitivity(
    *("weights", "state", "int8", "cpu-x86-64", "onnxruntime-cpu", "unet"),
    kept={"b": "slower when quantized: 9 us for 5 us on cpu-x86-64"},
    layers=(LayerCost("a", 0.03, 0.02, 0.01, 0.001), LayerCost("b", 0.04, 0.005, 0.009, 0.001)),
    points=(Point(0, "all quantized", 0.05, 0.8, 0.051, 0.81, 0.01), Point(1, "chosen", 0.03, 0.7, 0.031, 0.71, 0.01), Point(2, "", 0, 1)),
    notes=("A sentence.",),
)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["sensitivity", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def bundle(tmp_path: Path, make_bundle) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list:
    calls: list = []

    def sensitivity(*arguments, **settings):
        settings.pop("progress")("errors by layer", 1.0)
        calls.append((arguments, settings))
        return FOUND

    monkeypatch.setattr(library, "sensitivity", sensitivity)
    return calls


def test_what_is_handed_over(tmp_path: Path, bundle: Bundle, called: list) -> None:
    (tmp_path / "prompts").write_text("a shoe\n\n a bag\n")
    settings = ("--samples", 3, "--runs", 4, "--threads", 1, "--prompts", tmp_path / "prompts", "--max-error", 0.02)
    result = run(bundle.path, "--state", "state", "--source", "pipeline", *settings, "-o", "out.json")
    ((arguments, given),) = called
    assert arguments == (bundle, Path("state"), Path("out.json"))
    assert given.pop("request") == library.Request(3, 4, ("a shoe", "a bag"), 1)
    assert given == {"source": Path("pipeline"), "recipe": None, "target": "cpu-x86-64", "max_error": 0.02, "max_latency": None}
    assert "errors by layer" in result.stderr


def test_what_is_printed(bundle: Bundle, called: list) -> None:
    text = run(bundle.path, "--state", "state", "-o", "out.json").stdout
    assert text.startswith("out.json: unet, recipe int8, target cpu-x86-64\n")
    assert "1 of 2 layers stay float:" in text
    assert "0.710 ± 0.010" in text
    assert "A sentence." in text
    answer = json.loads(run(bundle.path, "--state", "state", "-o", "out.json", "--json").stdout)
    assert answer["kept"] == dict(FOUND.kept)
    assert answer["points"][1]["error"] == 0.031


def test_a_refusal_is_one_line_and_ends_with_2(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments, **settings):
        raise ArgumentError("No choice of layers holds the error of 1e-06", got="0.001", do="Allow a larger error.")

    monkeypatch.setattr(library, "sensitivity", refuse)
    result = run(bundle.path, "--state", "state", "-o", "out.json", code=2)
    assert result.stderr.splitlines()[-1] == "Error: No choice of layers holds the error of 1e-06. Got: 0.001. Allow a larger error."
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [("--runs", "0"), ("--samples", "x"), ("--max-error", "much")], ids=" ".join)
def test_arguments_that_cannot_be_used(bundle: Bundle, called: list, arguments: tuple[str, str]) -> None:
    run(bundle.path, "--state", "state", "-o", "out.json", *arguments, code=2)
    assert not called


def test_both_bounds_are_refused_before_anything_is_read(bundle: Bundle) -> None:
    result = run(bundle.path, "--state", "none", "-o", "out.json", "--max-error", 0.1, "--max-latency", 0.5, code=2)
    assert "cannot both be bounds" in result.stderr


def test_a_state_that_is_not_there(bundle: Bundle) -> None:
    assert "There is no quantization state 'none'" in run(bundle.path, "--state", "none", "-o", "out.json", code=2).stderr
