"""ONNX Runtime's providers for NVIDIA GPUs, against a library that stands for that build."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion import targets
from edgediffusion.bundle import Bundle
from edgediffusion.errors import EngineError
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline, engine_manifest
from edgediffusion.runtimes.build import build
from edgediffusion.runtimes.engines import _onnxruntime_gpu
from edgediffusion.runtimes.sizes import parse_sizes

from .tiny import DECODE, DENOISE, write_bundle, write_decoder, write_denoiser

pytest.importorskip("onnxruntime")
from .fake_onnxruntime import CUDA, PROCESSOR, TENSORRT, Fake, install

NAMES = ("onnxruntime-cuda", "onnxruntime-tensorrt")
AXES = {"batch": 2, "height": 6, "width": 4}
SIZES = parse_sizes("batch=1:2:4,height=6,width=4")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    return install(monkeypatch)


def made(name: str, folder: Path) -> Path:
    """A built engine of a UNet, where a bundle has it."""
    engine = find("runtimes.engines", name)
    write_denoiser(folder)
    file = folder / "engines" / "gpu" / f"unet{engine.suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    options = {"shapes": SIZES} if "shapes" in engine.options else {}
    engine.build(folder / DENOISE.model, file, threads=1, compute_capabilities=("8.9",), **options)
    return file


def feed(binding: Any, seed: int) -> None:
    for array in binding.inputs.values():
        array[...] = np.random.default_rng(seed).standard_normal(array.shape)


def expected(folder: Path, binding: Any) -> np.ndarray:
    plain = find("runtimes.engines", "onnxruntime").open_session(folder / DENOISE.model, threads=1).bind(AXES)
    for name, array in binding.inputs.items():
        plain.inputs[name][...] = array
    plain.run()
    return np.array(plain.outputs["out_sample"])


@pytest.mark.parametrize("name", NAMES)
class TestBoth:
    def test_computes_what_the_graph_computes(self, fake: Fake, name: str, tmp_path: Path) -> None:
        session = find("runtimes.engines", name).open_session(made(name, tmp_path), threads=1)
        assert (session.inputs, session.outputs) == (DENOISE.inputs, DENOISE.outputs)
        binding = session.bind(AXES)
        for seed in range(3):
            feed(binding, seed)
            binding.run()
            np.testing.assert_array_equal(binding.outputs["out_sample"], expected(tmp_path, binding))

    def test_every_binding_has_a_cuda_graph_of_its_own_up_to_a_number(self, fake: Fake, name: str, tmp_path: Path) -> None:
        session = find("runtimes.engines", name).open_session(made(name, tmp_path), threads=1)
        key = {"onnxruntime-cuda": "enable_cuda_graph", "onnxruntime-tensorrt": "trt_cuda_graph_enable"}[name]
        (provider, *_) = fake.sessions[-1]["providers"].values()
        assert provider[key] == "1"
        assert key not in next(iter(fake.sessions[0]["providers"].values()))  # not while it is built
        first, second = session.bind(AXES), session.bind(AXES)
        for binding in (first, second, first):
            binding.run()
        assert fake.runs == ["1", "2", "1"]
        for _ in range(_onnxruntime_gpu._MOST_GRAPHS):
            last = session.bind(AXES)
        last.run()
        assert fake.runs[-1] == "-1"

    def test_where_runs_cannot_be_noted_down_they_are_not(self, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path) -> None:
        fake = install(monkeypatch, noted=False)
        session = find("runtimes.engines", name).open_session(made(name, tmp_path), threads=1)
        session.bind(AXES).run()
        assert fake.runs == [""]

    def test_shared_arrays_are_the_buffers(self, fake: Fake, name: str, tmp_path: Path) -> None:
        session = find("runtimes.engines", name).open_session(made(name, tmp_path), threads=1)
        shared = {n: np.ones((2, 4, 6, 4), np.float32) for n in ("sample", "out_sample")}
        binding = session.bind(AXES, shared)
        assert binding.inputs["sample"] is shared["sample"]
        binding.run()
        np.testing.assert_array_equal(shared["out_sample"], expected(tmp_path, binding))

    def test_a_build_without_the_provider_is_refused(self, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path) -> None:
        install(monkeypatch, available=("AzureExecutionProvider", PROCESSOR))
        title = {"onnxruntime-cuda": "CUDA", "onnxruntime-tensorrt": "TensorRT"}[name]
        message = (
            rf"This onnxruntime has no provider for {title}. Got: onnxruntime \d.* with AzureExecutionProvider, {PROCESSOR}. "
            r"Put the other build in its place: pip uninstall onnxruntime, then pip install 'edgediffusion\[gpu\]'"
        )
        engine = find("runtimes.engines", name)
        for call in (engine.version, engine.compute_capability, lambda: made(name, tmp_path)):
            with pytest.raises(EngineError, match=message):
                call()

    def test_a_provider_that_cannot_be_loaded_is_no_reason_to_take_the_processor(
        self, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
    ) -> None:
        install(monkeypatch, loads=False)
        with pytest.raises(EngineError, match=r"could not be loaded, and ONNX Runtime would run 'unet/model.onnx' without it. .*cuDNN"):
            made(name, tmp_path)

    def test_products_on_the_processor_are_refused(self, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path) -> None:
        install(monkeypatch, declined=("Conv", "FusedConv", "Gather"))
        with pytest.raises(
            EngineError, match=r"would run products of 'unet/model.onnx' on the processor. Got: 1 that .* decline, as \w*Conv"
        ):
            made(name, tmp_path)

    def test_an_older_library_does_not_tell_where_nodes_run(self, fake: Fake, name: str, tmp_path: Path, monkeypatch: Any) -> None:
        from . import fake_onnxruntime

        monkeypatch.delattr(fake_onnxruntime.FakeSession, "get_provider_graph_assignment_info")
        assert made(name, tmp_path).exists()

    def test_another_gpu_than_the_one_here(self, fake: Fake, name: str, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        engine = find("runtimes.engines", name)
        with pytest.raises(EngineError, match=r"builds engines on the GPU that they are for. Got: compute capability 8.0, here 8.9"):
            engine.build(tmp_path / DENOISE.model, tmp_path / "x", compute_capabilities=("8.0",))

    def test_no_gpu(self, fake: Fake, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = made(name, tmp_path)
        monkeypatch.setattr(targets, "cuda_devices", lambda: ())
        with pytest.raises(EngineError, match=r"needs an NVIDIA GPU, and this machine shows none"):
            find("runtimes.engines", name).open_session(file)

    def test_nothing_is_printed(self, fake: Fake, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        made(name, tmp_path)
        assert capfd.readouterr().out == ""


class TestCuda:
    def test_keeps_the_optimized_graph(self, fake: Fake, tmp_path: Path) -> None:
        file = made("onnxruntime-cuda", tmp_path)
        assert fake.sessions[0]["optimized"] == str(file)
        assert fake.sessions[0]["providers"] == {CUDA: {"device_id": "0"}}
        assert file.exists()

    def test_finds_out_the_size_of_an_axis_that_only_an_output_has(self, fake: Fake, tmp_path: Path) -> None:
        write_decoder(tmp_path)
        session = find("runtimes.engines", "onnxruntime-cuda").open_session(tmp_path / DECODE.model, threads=1)
        binding = session.bind({"batch": 1, "height": 3, "width": 5})
        assert binding.outputs["sample"].shape == (1, 3, 6, 10)
        binding.run()
        assert fake.runs == ["-1", "1"]  # the run on zeros is not noted down


class TestTensorRT:
    def test_is_told_what_it_is_for_and_keeps_its_caches_beside_the_engine(self, fake: Fake, tmp_path: Path) -> None:
        file = made("onnxruntime-tensorrt", tmp_path)
        providers = fake.sessions[0]["providers"]
        assert list(providers) == [TENSORRT, CUDA]
        cache = str(file) + ".cache"
        assert providers[TENSORRT] == {
            "device_id": "0",
            "trt_engine_cache_enable": "1",
            "trt_timing_cache_enable": "1",
            "trt_engine_cache_path": cache,
            "trt_timing_cache_path": cache,
            "trt_profile_min_shapes": "sample:1x4x6x4,encoder_hidden_states:1x8x6",
            "trt_profile_opt_shapes": "sample:2x4x6x4,encoder_hidden_states:2x8x6",
            "trt_profile_max_shapes": "sample:4x4x6x4,encoder_hidden_states:4x8x6",
        }
        assert file.read_text(encoding="utf-8") == "unet/model.onnx\n"

    def test_moves_with_its_bundle(self, fake: Fake, tmp_path: Path) -> None:
        file = made("onnxruntime-tensorrt", tmp_path / "before")
        (tmp_path / "before").rename(tmp_path / "after")
        moved = tmp_path / "after" / file.relative_to(tmp_path / "before")
        find("runtimes.engines", "onnxruntime-tensorrt").open_session(moved, threads=1)
        assert fake.sessions[-1]["path"] == str(tmp_path / "after" / DENOISE.model)
        assert fake.sessions[-1]["providers"][TENSORRT]["trt_engine_cache_path"] == str(moved) + ".cache"

    def test_refuses_sizes_out_of_range_where_the_provider_would_build_anew(self, fake: Fake, tmp_path: Path) -> None:
        session = find("runtimes.engines", "onnxruntime-tensorrt").open_session(made("onnxruntime-tensorrt", tmp_path))
        with pytest.raises(EngineError, match=r"built for other sizes. Got: batch 5. Allowed: batch 1 to 4"):
            session.bind({**AXES, "batch": 5})

    def test_without_its_engines_or_its_graph_it_is_refused(self, fake: Fake, tmp_path: Path) -> None:
        file, engine = made("onnxruntime-tensorrt", tmp_path), find("runtimes.engines", "onnxruntime-tensorrt")
        for cached in Path(str(file) + ".cache").iterdir():
            cached.unlink()
        with pytest.raises(EngineError, match=r"has no engines of TensorRT. Build it anew"):
            engine.open_session(file)
        for content in ("../../elsewhere/model.onnx", "", "nowhere/model.onnx"):
            file.write_text(content, encoding="utf-8")
            with pytest.raises(EngineError, match=r"is no engine of a bundle. Got: the graph '.*', which is not there"):
                engine.open_session(file)

    def test_an_axis_without_a_range(self, fake: Fake, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        with pytest.raises(EngineError, match=r"axes without a range of sizes. Got: batch, height, width"):
            find("runtimes.engines", "onnxruntime-tensorrt").build(tmp_path / DENOISE.model, tmp_path / "x")


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_is_built_and_drawn_with(fake: Fake, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "gpu.toml"
    text = (Path(targets.__file__).parent / "l4.toml").read_text(encoding="utf-8")
    lines = [f'engines = ["{name}"]' if line.startswith("engines =") else line for line in text.splitlines()]
    lines = [line for line in lines if not line.startswith(("tensorrt = ", "libraries = "))]
    lines = [line.replace("formats = [", 'formats = ["float32", ') if '"float32"' not in line else line for line in lines]
    own.write_text("\n".join(lines), encoding="utf-8")
    bundle = write_bundle(tmp_path / "bundle")
    built = build(bundle, tmp_path / "built", target=str(own), threads=1)
    manifest = engine_manifest.read(built, "gpu")
    assert (manifest.engine, manifest.compute_capability, manifest.cpu) == (name, "8.9", ())
    assert bool(manifest.components["unet"].shapes) == (name == "onnxruntime-tensorrt")
    Bundle.open(tmp_path / "built")
    found, want = (Pipeline.from_bundle(b, threads=1)("a cat", seed=1).pixels for b in (built, bundle))
    np.testing.assert_allclose(found, want, atol=1e-6)
    monkeypatch.setattr(targets, "cuda_devices", lambda: (targets.Device("Another", 24.0, "9.0"),))
    with pytest.raises(EngineError, match=r"compute capability 8.9, here 9.0"):
        Pipeline.from_bundle(built)


def test_engines_of_a_build_are_listed_whole(fake: Fake, tmp_path: Path) -> None:
    files = {p.name for p in made("onnxruntime-tensorrt", tmp_path).parent.rglob("*") if p.is_file()}
    assert files == {"unet.ort-tensorrt", "unet.ort-tensorrt.json", "TensorrtExecutionProvider_TRTKernel_0_sm89.engine"}
