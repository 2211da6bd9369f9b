"""Engines that are picked by measuring: the table, the winner, several engines in one bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion import targets
from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, EngineError, MissingExtra
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline, engine_manifest, pick, preflight
from edgediffusion.runtimes.build import build
from edgediffusion.runtimes.sizes import parse_sizes

from .tiny import DENOISE, ENCODE, SAMPLING, write_bundle

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'edgediffusion[openvino]'")
TARGET = "cpu-x86-64"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("pick") / "bundle")


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pick, "_LONGEST_S", 0.0)  # the fewest runs will do


def own_target(folder: Path, **changes: str) -> str:
    text = (Path(targets.__file__).parent / f"{TARGET}.toml").read_text(encoding="utf-8")
    for key, value in changes.items():
        lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in text.splitlines()]
        text = "\n".join(lines)
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return str(folder / "mine.toml")


def test_the_fastest_wins_and_the_table_says_why(bundle: Bundle, tmp_path: Path) -> None:
    built = build(bundle, tmp_path / "built", pick="measured", threads=1)
    manifest = engine_manifest.read(built, TARGET)
    assert [(t["component"], t["engine"], t["precision"]) for t in manifest.trials] == [
        (c.name, engine, precision) for c in bundle.components for engine, precision in (("onnxruntime", ""), ("openvino", "float32"))
    ]
    for component in bundle.components:
        trials = [t for t in manifest.trials if t["component"] == component.name]
        (chosen,) = (t for t in trials if t["chosen"])
        assert chosen["median_ms"] == min(t["median_ms"] for t in trials) > 0
        assert manifest.engine_of(component.name) == chosen["engine"]
        assert all(t["error"] < 1e-5 for t in trials)
    assert built.history[-1].arguments == {"target": TARGET, "pick": "measured"}
    files = sorted(p.name for p in (built.path / "engines" / TARGET).rglob("*") if p.is_file())
    assert all(name.startswith(("engine.json", "text_encoder", "unet", "vae_decoder")) for name in files)
    assert not [p for p in (built.path / "engines" / TARGET).iterdir() if p.is_dir()]  # what lost is gone


def test_components_may_be_served_by_different_engines(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    medians = iter(([1.0, 2.0], [2.0, 1.0], [1.0, 2.0]))  # text encoder, UNet, decoder; ONNX Runtime, OpenVINO
    monkeypatch.setattr(pick, "_in_turns", lambda bindings: next(medians))
    built = build(bundle, tmp_path / "built", pick="measured", threads=1)
    manifest = engine_manifest.read(built, TARGET)
    assert manifest.engine == "openvino"
    assert [manifest.engine_of(c.name) for c in bundle.components] == ["onnxruntime", "openvino", "onnxruntime"]
    assert set(built.history[-1].versions) == {"edgediffusion", "openvino", "onnxruntime"}
    pixels = [Pipeline.from_bundle(built, target=t, threads=1)("a cat", seed=1).pixels for t in (TARGET, "onnx")]
    assert np.abs(pixels[0] - pixels[1]).max() < 1e-4
    monkeypatch.setattr(find("runtimes.engines", "onnxruntime"), "version", lambda: "0.1")
    with pytest.raises(EngineError, match=r"onnxruntime version \d.*, here 0.1. Build them anew"):
        preflight.check(manifest, built, TARGET)


def test_what_is_too_far_off_may_not_win_however_fast(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "BF16" not in __import__("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("This processor has no bfloat16.")

    def medians(bindings: Sequence[Any]) -> list[float]:
        return [float(len(bindings) - at) for at in range(len(bindings))]  # the later, the faster

    monkeypatch.setattr(pick, "_in_turns", medians)
    target = own_target(tmp_path, formats='["float32", "bfloat16", "int8"]')
    strict, lax = (build(bundle, tmp_path / n, target=target, pick="measured", max_error=e) for n, e in (("strict", 1e-4), ("lax", 0.1)))
    rows = [t for t in engine_manifest.read(strict, "mine").trials if t["component"] == "unet"]
    assert [(t["engine"], t["precision"], t["chosen"]) for t in rows] == [
        ("onnxruntime", "", False),
        ("openvino", "float32", True),
        ("openvino", "bfloat16", False),
    ]
    assert rows[2]["refused"].startswith("off by 0.00")
    assert engine_manifest.read(lax, "mine").precision == "bfloat16"


def test_an_engine_that_is_not_installed_is_a_row_of_the_table(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise MissingExtra("openvino", "openvino", "Running with OpenVINO")

    monkeypatch.setattr(find("runtimes.engines", "openvino"), "version", missing)
    manifest = engine_manifest.read(build(bundle, tmp_path / "built", pick="measured", threads=1), TARGET)
    assert manifest.versions().keys() == {"onnxruntime"}
    assert all("which is not installed" in t["refused"] for t in manifest.trials if t["engine"] == "openvino")


def test_where_no_engine_will_do_every_reason_is_told(bundle: Bundle, tmp_path: Path) -> None:
    old = '["openvino"]\nlibraries = { openvino = ">=1,<2" }\nsources = { libraries = "https://example.org" }'
    target = own_target(tmp_path, engines=old)
    with pytest.raises(EngineError, match=r"serves the component 'text_encoder'. Got: openvino float32: .*takes other versions"):
        build(bundle, tmp_path / "built", target=target, pick="measured", threads=1)
    assert not (tmp_path / "built").exists()


def test_there_are_two_ways_to_pick(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no such way to pick engines. Got: luck. Allowed: order, measured"):
        build(bundle, tmp_path / "built", pick="luck")


def test_inputs_of_the_trials_are_those_of_a_step_in_the_middle() -> None:
    sizes = parse_sizes("batch=1:2:4,height=8,width=6")
    fed = pick.call_inputs(DENOISE, SAMPLING, sizes)
    assert {name: array.shape for name, array in fed.items()} == {
        "sample": (2, 4, 8, 6),
        "timestep": (),
        "encoder_hidden_states": (2, 8, 6),
    }
    assert fed["timestep"] == 500
    assert abs(float(fed["sample"].std()) - 1) < 0.2
    assert not pick.call_inputs(ENCODE, SAMPLING, sizes)["input_ids"].any()


def test_candidates_take_turns_forwards_and_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str):
            self.name = name

        def run(self) -> None:
            order.append(self.name)

    medians = pick._in_turns([Fake("a"), Fake("b")])
    assert len(medians) == 2
    assert "".join(order[:8]) == "abbaabba"
    assert pick._in_turns([]) == []


def test_the_command_shows_the_table(bundle: Bundle, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgediffusion.cli import main

    arguments = ["build", str(bundle.path), "--target", TARGET, "--pick", "measured", "-o", str(tmp_path / "built")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "component" in result.output
    assert result.output.count("chosen") == 3
    (file,) = (tmp_path / "built" / "engines" / TARGET).glob("engine.json")
    assert len(json.loads(file.read_text())["trials"]) == 6
