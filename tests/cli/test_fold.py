"""The command ``fold``: what it hands on and prints, and that other steps are refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgediffusion import optimize
from edgediffusion.bundle import Bundle, Folded, Verb, write
from edgediffusion.cli import main
from edgediffusion.runtimes import Pipeline

Make = Callable[[Path], Bundle]
GRAPH = {"nodes_before": 90, "nodes_after": 60, "bytes_before": 3_000_000, "bytes_after": 2_000_000, "values": 7, "joined": ["pooled"]}
TIMESTEPS = (901.0, 601.0, 301.0, 1.0)


@pytest.fixture
def bundle(tmp_path: Path, make_bundle: Make) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def made(bundle: Bundle) -> Bundle:
    """The manifest of a bundle that was folded for four steps; its graphs are those of the other."""
    assert bundle.sampling is not None
    (bundle.path / "bundle.json").unlink()
    verb = Verb("fold", {"sampler": "ddim", "steps": 4, "graphs": {"unet": GRAPH}})
    sampling = replace(bundle.sampling, steps=4, folded=Folded("ddim", 4, TIMESTEPS))
    write(bundle.path, family=bundle.family, components=bundle.components, sampling=sampling, history=(*bundle.history, verb))
    return Bundle.open(bundle.path)


@pytest.fixture
def called(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def fold(bundle: Bundle, output: Path, **options: Any) -> Bundle:
        options.pop("progress")("folding unet", 0.5)
        seen.update(options, bundle=bundle.path, output=output)
        return made

    monkeypatch.setattr(optimize, "fold", fold)
    return seen


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def test_it_says_what_was_folded_and_what_was_not(called: dict[str, Any], made: Bundle) -> None:
    result = run("fold", made.path, "--steps", 4, "--sampler", "ddim", "-o", "new")
    assert called == {"bundle": made.path, "output": Path("new"), "steps": 4, "sampler": "ddim"}
    assert result.stdout.splitlines() == [
        "new: folded for 4 steps of 'ddim'",
        "",
        "graph  nodes  folded  size  folded  values in the table",
        "-----  -----  ------  ----  ------  -------------------",
        "unet      90      60  3 MB    2 MB                    7",
        "unet: what also depends on pooled is computed at every step, as before",
    ]
    assert "folding unet" in result.stderr


def test_steps_and_sampler_are_the_bundles_own_by_default(called: dict[str, Any], made: Bundle) -> None:
    answer = json.loads(run("fold", made.path, "-o", "new", "--json").stdout)
    assert (called["steps"], called["sampler"]) == (None, None)
    assert answer["folded"] == {"sampler": "ddim", "steps": 4, "graphs": {"unet": GRAPH}}
    assert answer["digest"] == made.digest


def test_other_steps_are_refused_before_anything_is_loaded(made: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(Pipeline, "from_bundle", load)
    result = run("run", made.path, "--prompt", "a shoe", "--steps", 3, "-o", tmp_path / "shoe.png", code=2)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: This bundle's time embedding was folded for 4 steps of the sampler 'ddim'. Got: 3 steps of 'ddim'")
    assert "Allowed: the time steps 901, 601, 301, 1." in line
    assert line.endswith("edgediffusion fold BUNDLE --steps 3 --sampler ddim -o NEW")
    assert not (tmp_path / "shoe.png").exists()


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--steps", "many"), ()])
def test_bad_arguments(bundle: Bundle, arguments: tuple[str, ...]) -> None:
    run("fold", bundle.path, *arguments, *(("-o", "new") if arguments else ()), code=2)


def test_inspect_tells_the_time_steps(made: Bundle) -> None:
    assert "folded           sampler=ddim, steps=4, timesteps=(901.0, 601.0, 301.0, 1.0)" in run("inspect", made.path).stdout


def test_a_bundle_that_was_not_folded_says_nothing_of_it(bundle: Bundle) -> None:
    assert "folded" not in run("inspect", bundle.path).stdout
    assert "folded" not in run("inspect", bundle.path, "--json").stdout
