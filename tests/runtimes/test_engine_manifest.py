"""Engines that were built for something else are refused before a library sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgediffusion import bundle as bundles
from edgediffusion import targets
from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, BundleError, EngineError
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline, engine_manifest, preflight
from edgediffusion.runtimes.engine_manifest import EngineManifest

from .tiny import SAMPLING, write_bundle

TARGET = "here"


def with_engines(folder: Path, *, target: str = TARGET, **changes: Any) -> Bundle:
    """A bundle with engines of ONNX Runtime; ``changes`` are made to their engine.json."""
    source = Bundle.open(folder) if folder.exists() else write_bundle(folder)
    engine = find("runtimes.engines", "onnxruntime")
    place = folder / "engines" / target
    place.mkdir(parents=True)
    names = {c.name: c.name + engine.suffix for c in source.components}
    for component in source.components:
        engine.build(folder / component.model, place / names[component.name], threads=1)
    manifest = EngineManifest.of("onnxruntime", engine.version(), source, names)
    content = {**json.loads(manifest.to_json()), **changes}
    (place / "engine.json").write_text(json.dumps(content))
    bundles.write(folder, family="tiny", components=source.components, sampling=SAMPLING, history=())
    return Bundle.open(folder)


def edit(bundle: Bundle, change: Mapping[str, Any]) -> dict[str, Any]:
    content = json.loads((bundle.path / "engines" / TARGET / "engine.json").read_text())
    return {**content, **change}


@pytest.fixture
def built(tmp_path: Path) -> Bundle:
    pytest.importorskip("onnxruntime")
    return with_engines(tmp_path / "bundle")


def test_built_engines_draw_the_picture_of_the_onnx_files(built: Bundle) -> None:
    pictures = {t: Pipeline.from_bundle(built, target=t, threads=1)("a cat", seed=1).pixels.tobytes() for t in (TARGET, "onnx", None)}
    assert len(set(pictures.values())) == 1  # the same optimized graphs on the same machine: the same bits


def test_reads_back_what_it_wrote(built: Bundle) -> None:
    manifest = engine_manifest.read(built, TARGET)
    assert manifest.engine == "onnxruntime"
    assert (manifest.os, manifest.arch, manifest.cpu) == (lambda h: (h.os, h.arch, h.cpu))(engine_manifest.host())
    assert set(manifest.components) == {"text_encoder", "unet", "vae_decoder"}
    preflight.check(manifest, built, TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.9"}, r"onnxruntime version 0\.9, here "),
        ({"os": "plan9"}, r"operating system plan9, here "),
        ({"arch": "vax"}, r"architecture vax, here "),
        ({"cpu": ["sve", "i8mm"]}, r"processor sve\+i8mm, here "),
    ],
)
def test_refuses_another_library_or_machine(built: Bundle, change: dict[str, Any], message: str) -> None:
    if "cpu" in change and not engine_manifest.host().cpu:
        pytest.skip("This system does not tell its instruction sets.")
    manifest = replace(engine_manifest.read(built, TARGET), **{k: tuple(v) if isinstance(v, list) else v for k, v in change.items()})
    with pytest.raises(EngineError, match=message + r".*edgediffusion build .* --target here -o NEW"):
        preflight.check(manifest, built, TARGET)


def test_refuses_engines_of_another_graph(built: Bundle) -> None:
    files = {**built.files, "unet/model.onnx": replace(built.files["unet/model.onnx"], sha256="0" * 64)}
    with pytest.raises(EngineError, match=r"ONNX file of 'unet' has changed"):
        Pipeline.from_bundle(replace(built, files=files), target=TARGET)


def test_refuses_a_file_outside_the_bundle(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = with_engines(tmp_path / "bundle")
    manifest = engine_manifest.read(bundle, TARGET)
    outside = replace(manifest.components["unet"], file="../../../elsewhere.onnx")
    with pytest.raises(EngineError, match="not among the bundle's files"):
        preflight.check(replace(manifest, components={**manifest.components, "unet": outside}), bundle, TARGET)


def test_refuses_an_engine_of_unknown_kind(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = with_engines(tmp_path / "bundle", engine="steam")
    with pytest.raises(ArgumentError, match=r"No engine is called 'steam'.*onnxruntime"):
        Pipeline.from_bundle(bundle)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"engine": 1, "version": 2, "os": 3, "arch": 4, "components": {"unet": {}}}'])
def test_refuses_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle.path / "engines" / TARGET).mkdir(parents=True)
    (bundle.path / "engines" / TARGET / "engine.json").write_text(content)
    with pytest.raises(BundleError, match=r"engine\.json.*missing or damaged.*edgediffusion build"):
        engine_manifest.read(bundle, TARGET)


def test_refuses_engines_that_lack_a_component(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = with_engines(tmp_path / "bundle", components={})
    with pytest.raises(BundleError, match=r"lack the component 'text_encoder'.*edgediffusion build"):
        Pipeline.from_bundle(bundle)


def test_a_target_that_nothing_was_built_for(built: Bundle) -> None:
    with pytest.raises(ArgumentError, match=r"no engines for the target 'toaster'.*Allowed: here, onnx.*--target toaster"):
        Pipeline.from_bundle(built, target="toaster")


def test_several_targets_and_none_named(built: Bundle) -> None:
    bundle = with_engines(built.path, target="there")
    with pytest.raises(ArgumentError, match=r"several targets.*here, there, onnx"):
        Pipeline.from_bundle(bundle)


def test_auto_is_the_engines_of_the_target_that_this_machine_is(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "detect", lambda: TARGET)
    assert engine_manifest.choose(built, "auto") == TARGET
    monkeypatch.setattr(targets, "detect", lambda: "t4")
    with pytest.raises(ArgumentError, match=r"no engines for the target 't4'. Allowed: here, onnx. .*--target t4"):
        engine_manifest.choose(built, "auto")


def test_a_manifest_of_an_older_version_lacks_what_was_not_known_then(built: Bundle) -> None:
    content = {k: v for k, v in edit(built, {}).items() if k not in ("compute_capability", "precision", "state")}
    for component in content["components"].values():
        del component["shapes"]
    (built.path / "engines" / TARGET / "engine.json").write_text(json.dumps(content))
    manifest = engine_manifest.read(built, TARGET)
    assert (manifest.compute_capability, manifest.precision, manifest.state) == ("", "", "")
    assert manifest.components["unet"].shapes == {}
    preflight.check(manifest, built, TARGET)
