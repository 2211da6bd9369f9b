"""What is compared before an engine is opened, and engines that are built anew: all of them, or those that no longer fit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edgediffusion import targets
from edgediffusion.bundle import Bundle, Verb, write
from edgediffusion.cli import main
from edgediffusion.errors import ArgumentError, BundleError, EngineError, MissingExtra, OutputError
from edgediffusion.registry import find, names
from edgediffusion.runtimes import Pipeline, engine_manifest, preflight
from edgediffusion.runtimes.build import build
from edgediffusion.runtimes.engine_manifest import EngineManifest
from edgediffusion.runtimes.request import Request, plan

from .tiny import DECODE, SAMPLING, write_bundle

pytest.importorskip("onnxruntime")
TARGET = "cpu-x86-64"
PLACE = f"engines/{TARGET}"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def built(bundle: Bundle, tmp_path: Path) -> Bundle:
    return build(bundle, tmp_path / "built", threads=1)


def with_manifest(bundle: Bundle, target: str = TARGET, **changes: Any) -> Bundle:
    """The bundle with other facts in its engine.json, as if it had been written so."""
    file = bundle.path / "engines" / target / "engine.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        where, _, name = key.rpartition("__")
        (content["components"][where] if where else content)[name] = value
    file.unlink()  # it may be a link to another bundle's
    file.write_text(json.dumps(content), encoding="utf-8")
    write(bundle.path, family="tiny", components=bundle.components, sampling=bundle.sampling, history=bundle.history)
    return Bundle.open(bundle.path)


def damage(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def inodes(bundle: Bundle) -> dict[str, int]:
    return {name: (bundle.path / name).stat().st_ino for name in bundle.files if name.startswith(PLACE)}


class TestOneMessage:
    def test_says_all_that_differs_and_the_command_with_the_options_that_were_given(self, built: Bundle) -> None:
        changed = with_manifest(built, version="0.9", os="plan9", arch="vax", precision="fp7", unet__weights_sha256="0" * 64)
        changed = replace(changed, history=(Verb("build", {"target": TARGET, "pick": "measured", "shapes": {"batch": "1:2:4"}}),))
        with pytest.raises(EngineError) as raised:
            preflight.check(engine_manifest.read(changed, TARGET), changed, TARGET)
        message = str(raised.value)
        for part in (
            "onnxruntime version 0.9, here ",
            "operating system plan9, here ",
            "architecture vax, here ",
            "precision fp7, the target has float32, int8",
            "the weights of 'unet' have changed since",
            f"edgediffusion build {built.path} --target {TARGET} --pick measured --shapes batch=1:2:4 -o NEW",
            "--rebuild",
        ):
            assert part in message

    def test_weights_that_changed_in_an_unchanged_graph(self, built: Bundle) -> None:
        weights = built.path / "unet" / "model.weights"
        damage(weights, bytes(weights.stat().st_size))
        write(built.path, family="tiny", components=built.components, sampling=SAMPLING, history=())
        with pytest.raises(EngineError, match=r"Got: the weights of 'unet' have changed since\."):
            Pipeline.from_bundle(built.path)

    def test_an_older_manifest_does_not_know_the_weights(self, built: Bundle) -> None:
        changed = with_manifest(built, unet__weights_sha256="")
        preflight.check(engine_manifest.read(changed, TARGET), changed, TARGET)

    @pytest.mark.parametrize(("built_on", "here", "fits"), [("570.86", "535.10", False), ("570.86", "580.1", True), ("570.86", "", True)])
    def test_an_older_driver_than_it_was_built_with(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, built_on: str, here: str, fits: bool
    ) -> None:
        engine = find("runtimes.engines", "tensorrt")
        monkeypatch.setattr(engine, "version", lambda: "10.3")
        monkeypatch.setattr(engine, "compute_capability", lambda: "8.9")
        machine = replace(targets.this_machine(), devices=(targets.Device("GPU", 24.0, "8.9", here),))
        monkeypatch.setattr(targets, "this_machine", lambda: machine)
        manifest = replace(EngineManifest.of("tensorrt", "10.3", bundle, {}, compute_capability="8.9"), driver=built_on)
        if fits:
            preflight.check(manifest, bundle, "l4")
            return
        with pytest.raises(EngineError, match=r"driver 570.86 or newer, here 535.10\."):
            preflight.check(manifest, bundle, "l4")

    def test_no_gpu_is_one_of_the_differences(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(find("runtimes.engines", "tensorrt"), "version", lambda: "10.3")
        monkeypatch.setattr(targets, "cuda_devices", lambda: ())
        manifest = EngineManifest.of("tensorrt", "10.4", bundle, {}, compute_capability="8.9")
        with pytest.raises(EngineError, match=r"tensorrt version 10.4, here 10.3; compute capability 8.9, here no GPU\."):
            preflight.check(manifest, bundle, "l4")

    def test_what_the_library_says_of_a_file_is_one_too(self, built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        engine, asked = find("runtimes.engines", "onnxruntime"), []

        def invalidity(file: Path) -> str:
            asked.append(file)
            return "UNSUPPORTED_CC" if file.name.startswith("unet") else ""

        monkeypatch.setattr(engine, "invalidity", invalidity, raising=False)
        with pytest.raises(EngineError, match=r"Got: onnxruntime calls the engine of 'unet' invalid here \(UNSUPPORTED_CC\)\."):
            preflight.check(engine_manifest.read(built, TARGET), built, TARGET)
        assert all(file.is_file() for file in asked)

    def test_no_such_library(self, built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> str:
            raise MissingExtra("onnxruntime", "cpu", "Running on this CPU")

        monkeypatch.setattr(find("runtimes.engines", "onnxruntime"), "version", missing)
        with pytest.raises(MissingExtra, match=r"'onnxruntime'.*pip install 'edgediffusion\[cpu\]'"):
            Pipeline.from_bundle(built)

    def test_sizes_out_of_an_engines_range(self, built: Bundle) -> None:
        changed = with_manifest(built, unet__shapes={"batch": [1, 2, 4], "height": [8, 8, 8]})
        asked = {"num_images": 3, "height": 24}
        with pytest.raises(
            EngineError, match=r"batch 1 to 4, asked for 6; height 8 to 8, asked for 12\. .*--shapes batch=1:2:6,height=8:8:12"
        ):
            preflight.ready(changed.path, plan=lambda facts: plan(Request("a cat", **asked), facts))
        for fitting in ({}, {"num_images": 2, "num_inference_steps": 50, "sampler": "euler"}, {"num_images": 4, "guidance_scale": 1.0}):
            assert preflight.ready(changed.path, plan=lambda facts, f=fitting: plan(Request("a dog", **f), facts)).digest == changed.digest


class TestRebuild:
    def test_what_fits_is_left_alone_whatever_is_drawn(self, built: Bundle) -> None:
        before = inodes(built)
        for options in ({}, {"num_inference_steps": 7}, {"sampler": "euler"}):
            found = preflight.ready(built.path, rebuild=True, plan=lambda facts, o=options: plan(Request("a shoe", **o), facts))
            assert (found.digest, inodes(found)) == (built.digest, before)

    def test_engines_of_another_version_are_replaced(self, built: Bundle) -> None:
        picture = Pipeline.from_bundle(built, threads=1)("a cat", seed=1).pixels
        old = with_manifest(built, version="0.9")
        with pytest.raises(EngineError, match=r"version 0.9"):
            preflight.ready(old.path)
        found = preflight.ready(old.path, rebuild=True, threads=1)
        assert found.path == old.path
        assert found.digest == Bundle.open(old.path).digest != old.digest
        assert found.history[-1].arguments == {"target": TARGET}  # nothing of another version is taken
        np.testing.assert_array_equal(Pipeline.from_bundle(found, threads=1)("a cat", seed=1).pixels, picture)
        assert [p.name for p in old.path.parent.iterdir() if p.name.startswith(".")] == []

    @pytest.mark.parametrize("content", [b"", b"half of it"])
    @pytest.mark.parametrize("name", ["unet.optimized.onnx", "unet.optimized.onnx.data", "engine.json"])
    def test_damaged_files_are_told_with_the_way_out_and_rebuilt(self, built: Bundle, name: str, content: bytes) -> None:
        damage(built.path / PLACE / name, content)
        with pytest.raises(
            BundleError, match=rf"'{PLACE}/{name}'.*was changed.*edgediffusion build .* --target {TARGET} -o NEW.*--rebuild"
        ):
            Pipeline.from_bundle(built.path)
        Pipeline.from_bundle(built.path, rebuild=True, threads=1)("a cat", num_inference_steps=1)
        Bundle.open(built.path)

    def test_only_the_damaged_engine_is_built(self, built: Bundle) -> None:
        damage(built.path / PLACE / "unet.optimized.onnx", b"half of it")
        found = preflight.ready(built.path, rebuild=True, threads=1)
        assert found.history[-1].arguments["reused"] == ["text_encoder", "vae_decoder"]

    def test_a_missing_file_is_rebuilt_too(self, built: Bundle) -> None:
        (built.path / PLACE / "unet.optimized.onnx").unlink()
        with pytest.raises(BundleError, match=r"lacks the file .*--rebuild"):
            Bundle.open(built.path)
        preflight.ready(built.path, rebuild=True, threads=1)
        Bundle.open(built.path)

    def test_a_damaged_graph_is_no_affair_of_rebuild(self, built: Bundle) -> None:
        damage(built.path / "unet" / "model.onnx", b"half of it")
        with pytest.raises(BundleError, match=r"'unet/model.onnx'.*was changed.*Make the bundle again"):
            preflight.ready(built.path, rebuild=True)

    def test_sizes_out_of_range_are_built_for(self, bundle: Bundle, tmp_path: Path) -> None:
        pytest.importorskip("openvino")
        built = build(bundle, tmp_path / "built", target="openvino-cpu", shapes="batch=1:2:2,height=8,width=8")
        changed = with_manifest(built, "openvino-cpu", unet__shapes={"batch": [1, 2, 2]})
        found = preflight.ready(changed.path, rebuild=True, plan=lambda facts: plan(Request("a cat", num_images=3), facts))
        assert found.history[-1].arguments["shapes"]["batch"] == "1:2:6"

    def test_the_old_bundle_stays_where_the_new_one_cannot_be_built(self, built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        old = with_manifest(built, version="0.9")

        def refuse(*arguments: Any, **options: Any) -> None:
            raise EngineError("No")

        monkeypatch.setattr(find("runtimes.engines", "onnxruntime"), "build", refuse)
        with pytest.raises(EngineError, match=r"component 'text_encoder' could not be built: No"):
            preflight.ready(old.path, rebuild=True)
        assert Bundle.open(old.path).digest == old.digest
        assert [p.name for p in old.path.parent.iterdir() if p.name.startswith(".")] == []

    def test_a_target_of_ones_own_has_to_be_named(self, bundle: Bundle, tmp_path: Path) -> None:
        own = tmp_path / "mine.toml"
        own.write_text((Path(targets.__file__).parent / f"{TARGET}.toml").read_text(encoding="utf-8"), encoding="utf-8")
        built = build(bundle, tmp_path / "built", target=str(own), threads=1)
        old = with_manifest(built, "mine", version="0.9")
        with pytest.raises(EngineError, match=r"a file of somebody's own.*--target mine.toml -o NEW"):
            preflight.ready(old.path, rebuild=True)

    def test_without_engines_there_is_nothing_to_build(self, bundle: Bundle) -> None:
        assert preflight.ready(bundle.path, rebuild=True).digest == bundle.digest
        with pytest.raises(ArgumentError, match=r"no engines for the target 't4'"):
            preflight.ready(bundle.path, target="t4", rebuild=True)

    def test_the_commands(self, built: Bundle, tmp_path: Path) -> None:
        with_manifest(built, version="0.9")
        draw = ["run", str(built.path), "--prompt", "a cat", "--steps", "1", "-o", str(tmp_path / "cat.png")]
        refused = CliRunner().invoke(main, draw)
        assert refused.exit_code == 1
        assert "version 0.9" in refused.output
        assert "--rebuild" in refused.output
        drawn = CliRunner().invoke(main, [*draw, "--rebuild"])
        assert drawn.exit_code == 0, drawn.output
        assert (tmp_path / "cat.png").is_file()
        for command in (["profile", str(built.path), "--runs", "1", "--warmup", "0", "--rebuild"],):
            with_manifest(Bundle.open(built.path), version="0.9")
            result = CliRunner().invoke(main, command)
            assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", names("cli"))
def test_every_command_that_runs_engines_can_rebuild_them(name: str) -> None:
    told = CliRunner().invoke(main, [name, "--help"]).output
    assert ("--rebuild" in told) == ("Which of the bundle's engines" in told)


class TestReuse:
    def changed(self, folder: Path, component: str) -> Bundle:
        """A bundle like the first, but for the decoder's graph or the UNet's weights."""
        bundle = write_bundle(folder)
        if component == "vae_decoder":
            model = onnx.load(folder / DECODE.model)
            model.doc_string = "another one"
            onnx.save(model, folder / DECODE.model)
        else:
            weights = folder / "unet" / "model.weights"
            weights.write_bytes(bytes(weights.stat().st_size))
        write(folder, family="tiny", components=bundle.components, sampling=SAMPLING, history=())
        return Bundle.open(folder)

    @pytest.mark.parametrize("component", ["vae_decoder", "unet"])
    def test_changing_one_component_builds_that_one(self, built: Bundle, tmp_path: Path, component: str) -> None:
        other = self.changed(tmp_path / "other", component)
        labels: list[str] = []
        again = build(other, tmp_path / "again", reuse=built, threads=1, progress=lambda label, part: labels.append(label))
        kept = [c.name for c in other.components if c.name != component]
        assert again.history[-1].arguments == {"target": TARGET, "reused": kept}
        assert {label for label in labels if "earlier" in label} == {f"{name}: taken from the earlier build" for name in kept}
        for name, inode in inodes(built).items():
            same = inodes(again).get(name) == inode
            assert same == any(name.startswith(f"{PLACE}/{k}") for k in kept)
        fresh = build(other, tmp_path / "fresh", threads=1)
        assert {n: f for n, f in again.files.items() if n.startswith(PLACE)} == {
            n: f for n, f in fresh.files.items() if n.startswith(PLACE)
        }

    @pytest.mark.parametrize(
        "change",
        [{"version": "0.9"}, {"arch": "vax"}, {"cpu": ["sve"]}, {"precision": "bfloat16"}, {"compute_capability": "8.9"}, {"os": "plan9"}],
    )
    def test_engines_of_another_kind_are_not_taken(self, bundle: Bundle, built: Bundle, tmp_path: Path, change: dict[str, Any]) -> None:
        again = build(bundle, tmp_path / "again", reuse=with_manifest(built, **change), threads=1)
        assert "reused" not in again.history[-1].arguments

    def test_a_damaged_engine_is_not_taken(self, bundle: Bundle, built: Bundle, tmp_path: Path) -> None:
        damage(built.path / PLACE / "unet.optimized.onnx.data", b"half of it")
        again = build(bundle, tmp_path / "again", reuse=Bundle.open(built.path, skip=PLACE), threads=1)
        assert again.history[-1].arguments["reused"] == ["text_encoder", "vae_decoder"]

    @pytest.mark.parametrize(("shapes", "kept"), [("batch=1:2:4", True), ("batch=1:3:4", False)])
    def test_engines_for_other_sizes_are_not_taken(self, bundle: Bundle, tmp_path: Path, shapes: str, kept: bool) -> None:
        pytest.importorskip("openvino")
        built = build(bundle, tmp_path / "built", target="openvino-cpu", threads=1)
        again = build(bundle, tmp_path / "again", target="openvino-cpu", shapes=shapes, reuse=built, threads=1)
        assert ("unet" in again.history[-1].arguments.get("reused", ())) == kept

    def test_engines_that_were_picked_keep_their_table(self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("openvino")
        from edgediffusion.runtimes import pick

        monkeypatch.setattr(pick, "_LONGEST_S", 0.0)
        built = build(bundle, tmp_path / "built", pick="measured", threads=1)
        again = build(bundle, tmp_path / "again", pick="measured", reuse=built, threads=1)
        assert again.history[-1].arguments["reused"] == [c.name for c in bundle.components]
        assert engine_manifest.read(again, TARGET) == engine_manifest.read(built, TARGET)
        ordered = build(bundle, tmp_path / "ordered", reuse=built, threads=1)
        assert "reused" not in ordered.history[-1].arguments

    def test_nothing_to_take(self, bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match=rf"has no engines for '{TARGET}' to take. Allowed: none: it was never built"):
            build(bundle, tmp_path / "again", reuse=write_bundle(tmp_path / "other"))

    def test_the_command_tells(self, bundle: Bundle, built: Bundle, tmp_path: Path) -> None:
        arguments = ["build", str(bundle.path), "--target", TARGET, "--reuse", str(built.path), "-o", str(tmp_path / "again")]
        result = CliRunner().invoke(main, arguments)
        assert f"Taken from {built.path}: text_encoder, unet, vae_decoder; built: nothing" in result.output


def _build_here(source: str, output: str, answers: Any) -> None:
    try:
        build(Bundle.open(source), Path(output), threads=1)
        answers.put("built")
    except OutputError as error:
        answers.put(str(error))


def test_of_two_builds_into_one_folder_one_wins_and_the_other_is_told(bundle: Bundle, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    both = [context.Process(target=_build_here, args=(str(bundle.path), str(tmp_path / "one"), answers)) for _ in range(2)]
    for process in both:
        process.start()
    told = sorted(answers.get(timeout=60) for _ in both)
    for process in both:
        process.join()
    assert told[1] == "built"
    assert "exists already" in told[0]
    Bundle.open(tmp_path / "one")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="There is no SIGKILL here.")
def test_a_build_that_is_killed_half_way_leaves_nothing_that_the_next_one_minds(bundle: Bundle, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from edgediffusion.bundle import Bundle\nfrom edgediffusion.runtimes.build import build\n"
        "def tell(label, part):\n    if label == 'unet':\n        print('half', flush=True)\n        time.sleep(60)\n"
        "build(Bundle.open(sys.argv[1]), Path(sys.argv[2]), threads=1, progress=tell)"
    )
    command = [sys.executable, "-c", script, str(bundle.path), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")] != []
    started = time.monotonic()
    build(bundle, tmp_path / "out", threads=1)
    assert time.monotonic() - started < 30
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
