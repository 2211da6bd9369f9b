"""What OpenVINO does beyond what every engine must: two compiled models, its precision, its refusals."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle, Verb
from edgediffusion.errors import ArgumentError, EngineError
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline, engine_manifest
from edgediffusion.runtimes.build import build
from edgediffusion.runtimes.sizes import parse_sizes

from .tiny import DECODE, DENOISE, SAMPLING, write_bundle, write_decoder, write_denoiser

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'edgediffusion[openvino]'")
AXES = {"batch": 2, "height": 8, "width": 8}
SHAPES = parse_sizes("batch=1:2:4,height=8,width=8")


@pytest.fixture
def engine() -> Any:
    return find("runtimes.engines", "openvino")


@pytest.fixture
def built(engine: Any, tmp_path: Path) -> Path:
    write_denoiser(tmp_path)
    engine.build(tmp_path / DENOISE.model, tmp_path / f"unet{engine.suffix}", threads=1, shapes=SHAPES)
    return tmp_path / f"unet{engine.suffix}"


def run(session: Any, axes: dict[str, int] = AXES) -> np.ndarray:
    binding = session.bind(axes)
    for seed, array in enumerate(binding.inputs.values()):
        array[...] = np.random.default_rng(seed).standard_normal(array.shape)
    binding.run()
    return binding.outputs["out_sample"].copy()


def has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_the_model_for_the_usual_sizes_runs_at_these_and_the_other_elsewhere(engine: Any, built: Path) -> None:
    session = engine.open_session(built, threads=1)
    assert list(session._models) == [".fixed"]
    usual = run(session)
    assert list(session._models) == [".fixed"]  # the other was not even loaded
    assert run(session, {**AXES, "height": 6}).shape == (2, 4, 6, 8)
    assert sorted(session._models) == ["", ".fixed"]
    built.with_name(built.name + ".fixed").write_bytes(b"")
    np.testing.assert_allclose(usual, run(engine.open_session(built.parent / DENOISE.model, threads=1)), atol=1e-5)


def test_computes_in_float32_though_the_processor_has_bfloat16(engine: Any, built: Path) -> None:
    reference = run(find("runtimes.engines", "onnxruntime").open_session(built.parent / DENOISE.model, threads=1))
    for file in (built, built.parent / DENOISE.model):
        np.testing.assert_allclose(run(engine.open_session(file, threads=1)), reference, atol=2e-6)


def test_computes_in_bfloat16_when_asked(engine: Any, tmp_path: Path) -> None:
    if not has_bfloat16():
        pytest.skip("This processor has no bfloat16.")
    write_denoiser(tmp_path)
    exact = run(engine.open_session(tmp_path / DENOISE.model, threads=1))
    engine.build(tmp_path / DENOISE.model, tmp_path / f"unet{engine.suffix}", precision="bfloat16", shapes=SHAPES)
    difference = np.abs(run(engine.open_session(tmp_path / f"unet{engine.suffix}", threads=1)) - exact).max()
    assert 1e-4 < difference < 5e-2  # eight bits of a number near one


def test_finds_out_the_size_of_an_axis_that_only_an_output_has(engine: Any, tmp_path: Path) -> None:
    write_decoder(tmp_path)
    binding = engine.open_session(tmp_path / DECODE.model, threads=1).bind(AXES)
    assert binding.outputs["sample"].shape == (2, 3, 16, 16)


def test_finds_out_the_type_of_an_output_that_the_file_does_not_tell(engine: Any, tmp_path: Path) -> None:
    from onnx import load

    write_denoiser(tmp_path)
    model = load(tmp_path / DENOISE.model, load_external_data=False)
    model.graph.output.add().name = "features"  # the convolution's, as a check of layers asks for it
    save(model, tmp_path / DENOISE.model)
    session = engine.open_session(tmp_path / DENOISE.model, threads=1)
    assert session.outputs[1].dtype == "float32"
    assert session.bind(AXES).outputs["features"].shape == (2, 4, 8, 8)


def test_shared_arrays_are_read_and_written_in_place(engine: Any, built: Path) -> None:
    session = engine.open_session(built, threads=1)
    mine, result = np.ones((2, 4, 8, 8), np.float32), np.zeros((2, 4, 8, 8), np.float32)
    binding = session.bind(AXES, {"sample": mine, "out_sample": result})
    assert binding.inputs["sample"] is mine
    assert binding.outputs["out_sample"] is result
    binding.run()
    first = result.copy()
    assert np.abs(first).max() > 0
    mine *= 2
    binding.run()
    assert np.abs(result - first).max() > 1e-3


def test_a_run_allocates_no_arrays(engine: Any, built: Path) -> None:
    binding = engine.open_session(built, threads=1).bind({"batch": 8, "height": 64, "width": 64})
    binding.run()
    tracemalloc.start()
    binding.run()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10_000  # the output has 524,288 bytes


@pytest.mark.parametrize("part", ["", ".fixed"])
def test_refuses_a_truncated_engine(engine: Any, built: Path, part: str) -> None:
    file = built.with_name(built.name + part)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(EngineError, match=r"OpenVINO could not load '.*unet.openvino"):
        run(engine.open_session(built, threads=1), AXES if part else {**AXES, "height": 4})


def test_refuses_an_engine_without_what_is_written_beside_it(engine: Any, built: Path) -> None:
    built.with_name(built.name + ".json").write_text("{}")
    with pytest.raises(EngineError, match=r"no engine that was built here. Got: unet.openvino.json: KeyError.* edgediffusion build"):
        engine.open_session(built)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float8"}, "does not compute float layers in this format. Got: float8. Allowed: float32, float16, bfloat16"),
        ({"device": "tpu"}, "knows no such device. Got: tpu. Allowed: cpu, gpu, npu"),
        ({"device": "npu"}, "finds no NPU on this machine. Allowed: CPU"),
        ({"shapes": parse_sizes("batch=2")}, "axes without a range of sizes. Got: height, width"),
    ],
)
def test_refuses_what_is_not_here(engine: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    import openvino

    if options.get("device") == "npu" and openvino.Core().available_devices != ["CPU"]:
        pytest.skip("This machine has more than a processor.")
    write_denoiser(tmp_path)
    with pytest.raises(EngineError, match=message):
        engine.build(tmp_path / DENOISE.model, tmp_path / f"unet{engine.suffix}", **options)


def test_refuses_a_graph_that_it_has_no_operator_for(engine: Any, tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Teleport", ["x"], ["y"], domain="com.example")], "g", value[:1], value[1:])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "strange.onnx")
    with pytest.raises(EngineError, match=r"OpenVINO could not compile '.*strange.onnx'. Got: .*Teleport") as raised:
        engine.build(tmp_path / "strange.onnx", tmp_path / f"x{engine.suffix}")
    assert "src/inference" not in str(raised.value).split(" OpenVINO does not support")[0][:80]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, OSError])
def test_maps_what_the_library_raises(engine: Any, error: type[Exception]) -> None:
    text = "Exception from src/inference/src/cpp/core.cpp:117:\nCheck 'x' failed at src/y.cpp:1499:\nno such kernel\n\n"
    with pytest.raises(EngineError, match=rf"Wrong. Got: {error.__name__}: no such kernel."), engine._mapped("Wrong"):
        raise error(text)


def test_says_nothing(engine: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_denoiser(tmp_path)
    engine.build(tmp_path / DENOISE.model, tmp_path / f"unet{engine.suffix}", threads=1, shapes=SHAPES)
    run(engine.open_session(tmp_path / f"unet{engine.suffix}", threads=1))
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_was_quantized_for_another_engine_says_so_where_it_fails(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch"]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Teleport", ["x"], ["y"], domain="com.example")], "g", value[:1], value[1:])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    save(helper.make_model(graph, opset_imports=imports, ir_version=10), bundle.path / DECODE.model)
    for arguments, advice in (
        (
            {"placement": "onnxruntime-cpu"},
            "placement 'onnxruntime-cpu', this target's is 'openvino': .* quantize .*openvino-cpu -o",
        ),
        ({"target": "rtx-4090"}, "placement 'tensorrt', this target's is 'openvino'"),
        ({"placement": "openvino"}, r"Got: .*Teleport[^:]*$"),
    ):
        history = (Verb("quantize", arguments),)
        bundles.write(bundle.path, family="tiny", components=bundle.components, sampling=SAMPLING, history=history)
        with pytest.raises(EngineError, match=r"'vae_decoder' could not be built: OpenVINO .*" + advice):
            build(Bundle.open(bundle.path), tmp_path / "built", target="openvino-cpu", threads=1)
        assert not (tmp_path / "built").exists()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("openvino") / "bundle")


def test_a_bundle_draws_the_picture_of_onnx_runtime(bundle: Bundle, tmp_path: Path) -> None:
    built = build(bundle, tmp_path / "built", target="openvino-cpu", threads=1)
    manifest = engine_manifest.read(built, "openvino-cpu")
    assert (manifest.engine, manifest.compute_capability, manifest.precision) == ("openvino", "", "")
    assert manifest.cpu == engine_manifest.host().cpu
    for prompts in ("a cat", ["a cat", "a red shoe", "blue"]):
        pixels = [Pipeline.from_bundle(built, target=t, threads=1)(prompts, seed=1).pixels for t in ("openvino-cpu", "onnx")]
        assert np.abs(pixels[0] - pixels[1]).max() < 2 / 255


def test_the_precision_is_kept_with_the_engines(bundle: Bundle, tmp_path: Path) -> None:
    if not has_bfloat16():
        pytest.skip("This processor has no bfloat16.")
    built = build(bundle, tmp_path / "built", target="openvino-cpu", precision="bfloat16")
    assert engine_manifest.read(built, "openvino-cpu").precision == "bfloat16"
    assert built.history[-1].arguments == {"target": "openvino-cpu", "precision": "bfloat16"}


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "cpu-x86-64",
            {"precision": "bfloat16"},
            "'onnxruntime' of the target 'cpu-x86-64' has no such option. Got: --precision. Allowed: none",
        ),
        ("cpu-x86-64", {"shapes": "batch=1:2:4"}, "no such option. Got: --shapes"),
        ("openvino-cpu", {"timing_cache": Path("x")}, "no such option. Got: --timing-cache. Allowed: --precision, --shapes"),
        ("openvino-cpu", {"shapes": "rows=1"}, "No graph of the bundle has such an axis. Got: rows. Allowed: batch, height, width"),
    ],
)
def test_options_that_an_engine_does_not_have_are_refused(
    bundle: Bundle, tmp_path: Path, target: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        build(bundle, tmp_path / "built", target=target, **options)
    assert not list(tmp_path.iterdir())
