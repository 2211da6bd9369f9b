"""TensorRT: running, against modules that stand for it and for CUDA; building, with TensorRT for RTX, which takes no GPU for it."""

from __future__ import annotations

import gc
import importlib.util
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from edgediffusion import targets
from edgediffusion.bundle import Bundle
from edgediffusion.errors import Cancelled, EngineError, MissingExtra
from edgediffusion.registry import find
from edgediffusion.runtimes import engine_manifest, preflight
from edgediffusion.runtimes.build import build
from edgediffusion.runtimes.engines import _cuda, _tensorrt
from edgediffusion.runtimes.engines._described import Described
from edgediffusion.runtimes.engines._tensorrt import Phases
from edgediffusion.runtimes.sizes import parse_sizes

from .fake_tensorrt import FakeBuilding, FakeCuda, FakeTensorRT, install
from .tiny import DECODE, DENOISE, write_bundle, write_decoder, write_denoiser

SHAPES = {"sample": (-1, 4, -2, -3), "timestep": (), "encoder_hidden_states": (-1, 8, 6), "out_sample": (-1, 4, -2, -3)}
SIZES = parse_sizes("batch=1:2:4,height=8,width=8")
AXES = {"batch": 2, "height": 8, "width": 8}
NAMES = ("tensorrt", "tensorrt-rtx")
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed: pip install 'edgediffusion[rtx]'"
)


def compute(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return {"out_sample": 2 * arrays["sample"] + arrays["timestep"] + arrays["encoder_hidden_states"].mean()}


@pytest.fixture(params=NAMES)
def faked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, FakeTensorRT, FakeCuda]]:
    library, cuda = install(monkeypatch, request.param.replace("-", "_"), SHAPES, compute)
    yield find("runtimes.engines", request.param), library, cuda
    _cuda.cuda.cache_clear()


def write_engine(folder: Path, content: bytes = b"engine of a UNet") -> Path:
    file = folder / "unet.plan"
    file.write_bytes(content)
    Described(DENOISE.inputs, DENOISE.outputs, SIZES).write(file)
    return file


def feed(binding: Any, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    for array in binding.inputs.values():
        array[...] = rng.standard_normal(array.shape)
    return compute({**binding.inputs})["out_sample"]


class TestRunning:
    def test_computes_what_the_engine_computes_from_the_third_run_on_as_one_graph(self, faked: Any, tmp_path: Path) -> None:
        engine, library, cuda = faked
        binding = engine.open_session(write_engine(tmp_path)).bind(AXES)
        for seed in range(5):
            expected = feed(binding, seed)
            binding.run()
            np.testing.assert_allclose(binding.outputs["out_sample"], expected, rtol=1e-6)
        assert library.enqueued == 2  # once as it is, once to be noted down
        assert cuda.calls.count("cudaGraphLaunch") == 4
        assert cuda.calls.count("cudaStreamCreate") == 1

    def test_where_it_cannot_be_noted_down_it_is_enqueued_every_time(self, faked: Any, tmp_path: Path, monkeypatch: Any) -> None:
        from . import fake_tensorrt

        engine, library, cuda = faked
        monkeypatch.setattr(fake_tensorrt.FakeContext, "is_stream_capturable", lambda self, stream: stream != 7, raising=False)
        binding = engine.open_session(write_engine(tmp_path)).bind(AXES)
        for seed in range(3):
            expected = feed(binding, seed)
            binding.run()
            np.testing.assert_allclose(binding.outputs["out_sample"], expected, rtol=1e-6)
        assert (library.enqueued, cuda.calls.count("cudaStreamBeginCapture")) == (3, 0)

    def test_session_tells_names_types_and_axes(self, faked: Any, tmp_path: Path) -> None:
        session = faked[0].open_session(write_engine(tmp_path))
        assert (session.inputs, session.outputs) == (DENOISE.inputs, DENOISE.outputs)

    def test_bindings_do_not_disturb_each_other_and_keep_their_arrays(self, faked: Any, tmp_path: Path) -> None:
        session = faked[0].open_session(write_engine(tmp_path))
        first, second = session.bind(AXES), session.bind({**AXES, "batch": 1})
        before = dict(first.outputs)
        expected = feed(first, 1)
        first.run()
        feed(second, 2)
        second.run()
        assert first.outputs["out_sample"] is before["out_sample"]
        np.testing.assert_allclose(first.outputs["out_sample"], expected, rtol=1e-6)

    def test_buffers_begin_as_zeros_and_are_given_back(self, faked: Any, tmp_path: Path) -> None:
        engine, _, cuda = faked
        binding = engine.open_session(write_engine(tmp_path)).bind(AXES)
        assert not any(array.any() for array in (*binding.inputs.values(), *binding.outputs.values()))
        assert len(cuda.memory) == 8  # of each of four tensors the array and its twin
        del binding
        gc.collect()
        assert len(cuda.memory) == 0

    def test_shared_arrays_are_the_buffers(self, faked: Any, tmp_path: Path) -> None:
        session = faked[0].open_session(write_engine(tmp_path))
        mine = np.ones((2, 4, 8, 8), np.float32)
        binding = session.bind(AXES, {"sample": mine})
        assert binding.inputs["sample"] is mine
        mine *= 3
        binding.run()
        np.testing.assert_array_equal(binding.outputs["out_sample"], np.full((2, 4, 8, 8), 6, np.float32))

    def test_finds_out_the_size_of_an_axis_that_only_an_output_has(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        shapes = {"latent_sample": (-1, 4, -2, -3), "sample": (-1, 3, -4, -5)}
        install(monkeypatch, "tensorrt", shapes, lambda arrays: {"sample": 5.0})
        file = tmp_path / "vae_decoder.plan"
        file.write_bytes(b"engine")
        Described(DECODE.inputs, DECODE.outputs, SIZES).write(file)
        binding = find("runtimes.engines", "tensorrt").open_session(file).bind(AXES)
        assert binding.outputs["sample"].shape == (2, 3, 16, 16)
        binding.run()
        assert (binding.outputs["sample"] == 5).all()

    def test_refuses_sizes_out_of_the_engines_ranges(self, faked: Any, tmp_path: Path) -> None:
        session = faked[0].open_session(write_engine(tmp_path))
        with pytest.raises(EngineError, match=r"Got: batch 6. Allowed: batch 1 to 4. .*--shapes batch=1:2:6,height=8,width=8 -o NEW"):
            session.bind({**AXES, "batch": 6})
        with pytest.raises(EngineError, match=r"'sample'.*Got: width"):
            session.bind({"batch": 1, "height": 8})

    def test_a_full_gpu_is_told(self, faked: Any, tmp_path: Path) -> None:
        engine, _, cuda = faked
        session = engine.open_session(write_engine(tmp_path))
        cuda.limit_bytes = 100
        with pytest.raises(EngineError, match=r"CUDA refused cudaHostAlloc. Got: out of memory \(cudaErrorMemoryAllocation\)"):
            session.bind(AXES)

    def test_refuses_a_damaged_engine_with_the_librarys_first_complaint(self, faked: Any, tmp_path: Path) -> None:
        with pytest.raises(
            EngineError, match=r"could not load '.*unet.plan'. Got: Serialization assertion .* failed[.] Build it anew with"
        ):
            faked[0].open_session(write_engine(tmp_path, b"no engine"))

    def test_refuses_an_engine_of_other_tensors(self, faked: Any, tmp_path: Path) -> None:
        file = write_engine(tmp_path)
        Described(DECODE.inputs, DECODE.outputs, SIZES).write(file)
        with pytest.raises(EngineError, match=r"other tensors than what is written beside it. Got: encoder_hidden_states, out_sample"):
            faked[0].open_session(file)

    def test_refuses_an_empty_file(self, faked: Any, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"could not load '.*unet.plan'"):
            faked[0].open_session(write_engine(tmp_path, b""))

    def test_an_engine_that_the_library_calls_invalid_is_not_loaded(self, faked: Any, tmp_path: Path, monkeypatch: Any) -> None:
        from . import fake_tensorrt

        engine, library, _ = faked
        library.EngineValidity = type("EngineValidity", (), {"INVALID": 2})
        library.EngineInvalidityDiagnostics = type(
            "D", (), {"__members__": {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4}}
        )
        monkeypatch.setattr(fake_tensorrt.FakeRuntime, "engine_header_size", 6, raising=False)
        monkeypatch.setattr(
            fake_tensorrt.FakeRuntime, "get_engine_validity", lambda self, header: (2, 6 * (header == b"engine")), raising=False
        )
        with pytest.raises(EngineError, match=r"is not valid here. Got: UNSUPPORTED_CC, OLD_CUDA_DRIVER. Build it anew"):
            engine.open_session(write_engine(tmp_path))
        if hasattr(engine, "invalidity"):  # what the preflight asks
            assert engine.invalidity(write_engine(tmp_path)) == "UNSUPPORTED_CC, OLD_CUDA_DRIVER"
            assert engine.invalidity(write_engine(tmp_path, b"another engine")) == "no reason given"
            with pytest.raises(EngineError, match=r"could not read '.*missing.rtx'"):
                engine.invalidity(tmp_path / "missing.rtx")

    def test_without_a_gpu_it_says_so(self, faked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(targets, "cuda_devices", lambda: ())
        with pytest.raises(EngineError, match=r"needs an NVIDIA GPU, and this machine shows none"):
            faked[0].open_session(write_engine(tmp_path))

    def test_without_cuda_python_it_names_the_extra(self, faked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(__import__("sys").modules, "cuda.bindings.runtime")
        with pytest.raises(MissingExtra, match=r"needs the Python module 'cuda.bindings.runtime'.*pip install 'edgediffusion\["):
            faked[0].open_session(write_engine(tmp_path))

    def test_an_engine_for_another_gpu_or_version_is_refused_in_one_message(self, faked: Any, tmp_path: Path) -> None:
        engine, _, _ = faked
        bundle = write_bundle(tmp_path / "bundle")
        name = engine.__name__.rsplit(".", 1)[1].replace("_", "-")
        manifest = engine_manifest.EngineManifest.of(name, "9.1", bundle, {}, compute_capability="8.9")
        assert manifest.cpu == ()
        with pytest.raises(EngineError, match=rf"{name} version 9.1, here 10.3.0; compute capability 8.9, here 8.7. .*edgediffusion build"):
            preflight.check(manifest, bundle, "rtx-4090")
        preflight.check(replace(manifest, version="10.3.0", compute_capability="8.7"), bundle, "rtx-4090")

    def test_engines_of_rtx_go_to_another_system_and_those_of_tensorrt_do_not(self, faked: Any, tmp_path: Path) -> None:
        engine, _, _ = faked
        bundle = write_bundle(tmp_path / "bundle")
        name = engine.__name__.rsplit(".", 1)[1].replace("_", "-")
        manifest = replace(engine_manifest.EngineManifest.of(name, "10.3.0", bundle, {}, compute_capability="8.7"), os="plan9")
        if name == "tensorrt-rtx":
            preflight.check(manifest, bundle, "rtx-4090")
            return
        with pytest.raises(EngineError, match=r"operating system plan9, here"):
            preflight.check(manifest, bundle, "t4")


class TestBuildingOnTheDevice:
    """TensorRT proper, on a fake Orin: compute capability 8.7."""

    @pytest.fixture
    def building(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, FakeBuilding]]:
        library, _ = install(monkeypatch, "tensorrt", SHAPES, compute)
        monkeypatch.setattr(_tensorrt, "_TICK_S", 0.01)
        yield find("runtimes.engines", "tensorrt"), FakeBuilding(library)
        _cuda.cuda.cache_clear()

    def test_builds_strongly_typed_with_a_range_for_every_axis_and_runs_what_it_built(self, building: Any, tmp_path: Path) -> None:
        engine, seen = building[0], building[1].seen
        write_denoiser(tmp_path)
        told: list[tuple[str, float]] = []
        engine.build(
            tmp_path / DENOISE.model,
            tmp_path / "unet.plan",
            compute_capabilities=("8.7",),
            shapes=SIZES,
            progress=lambda label, part: told.append((label, part)),
        )
        assert seen["flags"] == 1 << 3
        assert seen["shapes"]["sample"] == ([1, 4, 8, 8], [2, 4, 8, 8], [4, 4, 8, 8])
        assert set(seen["shapes"]) == {"sample", "encoder_hidden_states"}  # the time step has no axis of its own
        parts = [part for label, part in told if label == "Building engine"]
        assert len(parts) > 3
        assert parts == sorted(parts)
        binding = engine.open_session(tmp_path / "unet.plan").bind(AXES)
        expected = feed(binding, 1)
        binding.run()
        np.testing.assert_allclose(binding.outputs["out_sample"], expected, rtol=1e-6)

    def test_the_timing_cache_goes_on_from_the_last_build(self, building: Any, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        for build_number in (1, 2):
            engine_file = tmp_path / f"{build_number}.plan"
            building[0].build(tmp_path / DENOISE.model, engine_file, shapes=SIZES, timing_cache=tmp_path / "cache" / "orin.cache")
        assert (tmp_path / "cache" / "orin.cache").read_bytes() == b"one kernel, one kernel, "
        assert [p.name for p in (tmp_path / "cache").iterdir()] == ["orin.cache"]

    def test_another_gpu_than_the_one_here_is_refused(self, building: Any, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        with pytest.raises(EngineError, match=r"builds engines on the GPU that they are for. Got: compute capability 8.9, here 8.7. Copy"):
            building[0].build(tmp_path / DENOISE.model, tmp_path / "unet.plan", compute_capabilities=("8.9",), shapes=SIZES)

    def test_what_progress_raises_stops_the_builder(self, building: Any, tmp_path: Path) -> None:
        def stop(label: str, part: float) -> None:
            raise KeyboardInterrupt

        write_denoiser(tmp_path)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            building[0].build(tmp_path / DENOISE.model, tmp_path / "unet.plan", shapes=SIZES, progress=stop)
        assert time.monotonic() - started < 5
        assert not (tmp_path / "unet.plan").exists()


def test_phases_tell_how_much_of_the_outermost_is_done_and_never_go_back() -> None:
    phases, parts = Phases(), []
    phases.start("Building engine", None, 2)
    phases.start("Optimizing", "Building engine", 4)
    for step in range(4):
        phases.step("Optimizing", step)
        parts.append(phases.part())
    assert parts == [0.125, 0.25, 0.375, 0.5]
    assert phases.current == "Optimizing"
    phases.finish("Optimizing")
    assert phases.part() == 0.5
    phases.step("Building engine", 0)
    phases.start("Timing", "Building engine", 0)
    assert (phases.part(), phases.current) == (0.5, "Timing")
    phases.step("unheard of", 3)
    phases.finish("Timing")
    phases.step("Building engine", 1)
    assert phases.part() == 1.0


@needs_rtx
class TestBuilding:
    @pytest.fixture
    def engine(self) -> Any:
        return find("runtimes.engines", "tensorrt-rtx")

    def test_builds_without_a_gpu_for_several_at_once(self, engine: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        write_denoiser(tmp_path)
        told: list[tuple[str, float]] = []
        built = tmp_path / f"unet{engine.suffix}"
        engine.build(
            tmp_path / DENOISE.model,
            built,
            compute_capabilities=("8.6", "8.9", "12.0"),
            shapes=SIZES,
            progress=lambda label, part: told.append((label, part)),
        )
        assert built.stat().st_size > 1000
        known = json.loads(built.with_name(built.name + ".json").read_text())
        assert known["ranges"]["batch"] == {"smallest": 1, "usual": 2, "largest": 4}
        assert [s["name"] for s in known["inputs"]] == ["sample", "timestep", "encoder_hidden_states"]
        assert all(0 <= part < 1 for _, part in told)
        assert capfd.readouterr() == ("", "")

    def test_a_bundles_engines_know_what_they_are_for(self, engine: Any, tmp_path: Path) -> None:
        bundle = write_bundle(tmp_path / "bundle")
        told: list[tuple[str, float]] = []
        built = build(bundle, tmp_path / "built", target="rtx-3060", progress=lambda label, part: told.append((label, part)))
        manifest = engine_manifest.read(built, "rtx-3060")
        assert (manifest.engine, manifest.version, manifest.compute_capability) == ("tensorrt-rtx", engine.version(), "8.6")
        assert manifest.components["unet"].shapes == {"batch": (1, 2, 4), "height": (8, 8, 8), "width": (8, 8, 8)}
        assert manifest.components["text_encoder"].shapes == {"batch": (1, 2, 4)}
        assert (manifest.cpu, manifest.state) == ((), "")
        parts = [part for _, part in told]
        assert parts == sorted(parts)
        assert (told[0], told[-1]) == (("text_encoder", 0.0), ("done", 1.0))
        assert built.targets == ("rtx-3060",)

    def test_a_target_of_another_architecture_is_built_for_where_it_is(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        own = tmp_path / "mine.toml"
        text = (Path(targets.__file__).parent / "rtx-3060.toml").read_text().replace('"x86-64"', '"arm64"').replace("ahead = true\n", "")
        own.write_text(text)
        with pytest.raises(
            EngineError, match=r"Engines for 'mine' are built on such a machine. Got: .* Allowed: linux, windows on arm64. Make a kit"
        ):
            build(write_bundle(tmp_path / "bundle"), tmp_path / "built", target=str(own))

    def test_a_library_of_another_version_is_refused(self, tmp_path: Path) -> None:
        own = tmp_path / "mine.toml"
        own.write_text((Path(targets.__file__).parent / "rtx-3060.toml").read_text().replace(">=1.7,<2", ">=1.2,<1.3"))
        with pytest.raises(EngineError, match=r"'mine' takes other versions of tensorrt-rtx. Got: 1\..* Allowed: >=1.2,<1.3"):
            build(write_bundle(tmp_path / "bundle"), tmp_path / "built", target=str(own))

    def test_an_opset_that_is_too_new_is_refused_with_the_verb_that_helps(self, tmp_path: Path) -> None:
        own = tmp_path / "mine.toml"
        own.write_text((Path(targets.__file__).parent / "rtx-3060.toml").read_text().replace("opset = 23", "opset = 17"))
        with pytest.raises(EngineError, match=r"opset of 'text_encoder'. Got: 18. Allowed: 17 and older. Lower it: edgediffusion lower"):
            build(write_bundle(tmp_path / "bundle"), tmp_path / "built", target=str(own))

    def test_float32_for_a_gpu_whose_float_kernels_are_float16(self, tmp_path: Path) -> None:
        with pytest.raises(
            EngineError, match=r"'rtx-2080' has no kernels for the float format of 'text_encoder'. Got: float32. .*--dtype fp16"
        ):
            build(write_bundle(tmp_path / "bundle"), tmp_path / "built", target="rtx-2080")

    def test_fp8_for_a_gpu_without_it_is_refused_before_the_build(self, tmp_path: Path) -> None:
        bundle = with_fp8(write_bundle(tmp_path / "bundle"))
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"'rtx-3060' has no kernels for what 'unet' is computed in. Got: fp8. Allowed: .*rtx-4090"):
            build(bundle, tmp_path / "built", target="rtx-3060")
        assert time.monotonic() - started < 5
        assert not (tmp_path / "built").exists()

    def test_an_axis_without_a_range(self, engine: Any, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        with pytest.raises(EngineError, match=r"axes without a range of sizes. Got: height, width"):
            engine.build(tmp_path / DENOISE.model, tmp_path / "x.rtx", compute_capabilities=("8.6",), shapes=parse_sizes("batch=1"))

    def test_a_gpu_that_it_does_not_build_for(self, engine: Any, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        with pytest.raises(EngineError, match=r"does not build for this compute capability. Got: 8.7. Allowed: 7.5, 8.0, 8.6, 8.9, 12.0"):
            engine.build(tmp_path / DENOISE.model, tmp_path / "x.rtx", compute_capabilities=("8.7",), shapes=SIZES)

    def test_a_graph_that_its_parser_cannot_read(self, engine: Any, tmp_path: Path) -> None:
        value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
        graph = helper.make_graph([helper.make_node("Teleport", ["x"], ["y"], domain="com.example")], "g", value[:1], value[1:])
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
        save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "strange.onnx")
        with pytest.raises(EngineError, match=r"cannot read '.*strange.onnx'. Got: .*Teleport"):
            engine.build(tmp_path / "strange.onnx", tmp_path / "x.rtx", compute_capabilities=("8.6",), shapes={})
        assert not (tmp_path / "x.rtx").exists()

    def test_a_build_that_is_stopped_leaves_nothing(self, tmp_path: Path) -> None:
        def stop(label: str, part: float) -> None:
            if label.startswith("unet"):
                raise Cancelled("Enough")

        with pytest.raises(Cancelled, match="Enough"):
            build(write_bundle(tmp_path / "bundle"), tmp_path / "built", target="rtx-3060", progress=stop)
        assert [p.name for p in tmp_path.iterdir()] == ["bundle"]

    def test_what_progress_raises_while_the_library_works_ends_the_build(self, engine: Any, tmp_path: Path, monkeypatch: Any) -> None:
        from edgediffusion.runtimes.engines import _tensorrt

        monkeypatch.setattr(_tensorrt, "_TICK_S", 0.001)

        def stop(label: str, part: float) -> None:
            raise Cancelled("Enough")

        write_decoder(tmp_path)
        with pytest.raises(Cancelled, match="Enough"):
            engine.build(tmp_path / DECODE.model, tmp_path / "x.rtx", compute_capabilities=("8.6",), shapes=SIZES, progress=stop)


def with_fp8(bundle: Bundle) -> Bundle:
    """The bundle with a weight of fp8 in its UNet, which nothing reads."""
    from onnx import load

    from edgediffusion import bundle as bundles

    file = bundle.path / DENOISE.model
    model = load(file, load_external_data=False)
    model.graph.initializer.append(TensorProto(name="fp8", data_type=TensorProto.FLOAT8E4M3FN, dims=[4], raw_data=b"\0" * 4))
    save(model, file)
    bundles.write(bundle.path, family="tiny", components=bundle.components, sampling=bundle.sampling, history=())
    return Bundle.open(bundle.path)
