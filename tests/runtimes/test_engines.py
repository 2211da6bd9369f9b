"""What every engine must do, for each file of the folder; and what ONNX Runtime does beyond that."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from edgediffusion.bundle import Component, TensorSpec
from edgediffusion.errors import EngineError, MissingExtra
from edgediffusion.registry import find, names
from edgediffusion.runtimes.engines import _onnxruntime

from .tiny import DECODE, DENOISE, _random, write_decoder, write_denoiser, write_onnx

AXES = {"batch": 2, "height": 6, "width": 4}


def model_for(name: str, folder: Path) -> Path:
    """A denoiser in the form that the engine reads."""
    if name != "null":
        write_denoiser(folder)
        return folder / DENOISE.model
    file = folder / "unet.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"inputs": [asdict(s) for s in DENOISE.inputs], "outputs": [asdict(s) for s in DENOISE.outputs]}))
    return file


def fill(binding: Any, seed: int) -> None:
    for array in binding.inputs.values():
        array[...] = np.random.default_rng(seed).standard_normal(array.shape)


@pytest.mark.parametrize("name", names("runtimes.engines"))
class TestEveryEngine:
    @pytest.fixture
    def engine(self, name: str) -> Any:
        module = find("runtimes.engines", name)
        try:
            module.version()
            if hasattr(module, "compute_capability"):
                module.compute_capability()
        except (MissingExtra, EngineError) as error:  # no such library, or no GPU that it could run on
            pytest.skip(str(error))
        return module

    def test_naming_it_loads_no_library(self, name: str) -> None:
        script = (
            "import sys; from edgediffusion.registry import find; "
            f"find('runtimes.engines', {name!r}); print(sorted({{m.split('.')[0] for m in sys.modules}}))"
        )
        loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        assert not [lib for lib in ("onnxruntime", "tensorrt", "tensorrt_rtx", "openvino", "torch", "onnx") if f"'{lib}'" in loaded]

    def test_says_its_version_and_suffix(self, engine: Any) -> None:
        assert engine.version()
        assert engine.suffix.startswith(".")

    def test_session_tells_names_types_and_axes(self, engine: Any, name: str, tmp_path: Path) -> None:
        session = engine.open_session(model_for(name, tmp_path), threads=1)
        assert session.inputs == DENOISE.inputs
        assert session.outputs == DENOISE.outputs

    def test_binding_keeps_its_arrays(self, engine: Any, name: str, tmp_path: Path) -> None:
        binding = engine.open_session(model_for(name, tmp_path), threads=1).bind({**AXES, "elsewhere": 9})
        before = {**binding.inputs, **binding.outputs}
        assert {n: a.shape for n, a in before.items()} == {
            "sample": (2, 4, 6, 4),
            "timestep": (),
            "encoder_hidden_states": (2, 8, 6),
            "out_sample": (2, 4, 6, 4),
        }
        fill(binding, 1)
        binding.run()
        after = {**binding.inputs, **binding.outputs}
        assert all(after[n] is before[n] for n in before)

    def test_shared_arrays_are_its_buffers(self, engine: Any, name: str, tmp_path: Path) -> None:
        session = engine.open_session(model_for(name, tmp_path), threads=1)
        shared = {n: np.ones((2, 4, 6, 4), np.float32) for n in ("sample", "out_sample", "of another graph")}
        binding = session.bind(AXES, shared)
        assert binding.inputs["sample"] is shared["sample"]
        assert binding.outputs["out_sample"] is shared["out_sample"]
        binding.run()
        own = session.bind(AXES)
        fill(own, 0)
        for n, array in own.inputs.items():
            array[...] = binding.inputs[n]
        own.run()
        if name != "null":  # which computes nothing
            np.testing.assert_array_equal(shared["out_sample"], own.outputs["out_sample"])

    def test_refuses_a_shared_array_that_does_not_fit(self, engine: Any, name: str, tmp_path: Path) -> None:
        session = engine.open_session(model_for(name, tmp_path), threads=1)
        fitting = np.zeros((2, 4, 6, 4), np.float32)
        for array in (fitting.astype(np.float64), fitting[0], fitting.transpose(0, 1, 3, 2), np.zeros((2, 5, 6, 4), np.float32)):
            with pytest.raises(EngineError, match=r"shared array 'sample' does not fit.*float32 \('batch', 4, 'height', 'width'\)"):
                session.bind(AXES, {"sample": array})

    def test_bindings_of_one_session_do_not_disturb_each_other(self, engine: Any, name: str, tmp_path: Path) -> None:
        session = engine.open_session(model_for(name, tmp_path), threads=1)
        first, second = session.bind(AXES), session.bind({**AXES, "batch": 1})
        fill(first, 1)
        first.run()
        result = first.outputs["out_sample"].copy()
        fill(second, 2)
        second.run()
        np.testing.assert_array_equal(first.outputs["out_sample"], result)

    def test_built_engine_gives_the_same_numbers(self, engine: Any, name: str, tmp_path: Path) -> None:
        model = model_for(name, tmp_path)
        built = tmp_path / "engines" / f"unet{engine.suffix}"
        built.parent.mkdir()
        engine.build(model, built, threads=1)
        (tmp_path / "engines").rename(tmp_path / "moved")  # engines are made in a folder that is renamed when complete
        results = []
        for file in (model, tmp_path / "moved" / built.name):
            binding = engine.open_session(file, threads=1).bind(AXES)
            fill(binding, 3)
            binding.run()
            results.append(binding.outputs["out_sample"])
        np.testing.assert_array_equal(*results)  # the same optimized graph, so the same bits

    def test_same_feeds_same_bits(self, engine: Any, name: str, tmp_path: Path) -> None:
        results = set()
        for _ in range(3):
            binding = engine.open_session(model_for(name, tmp_path), threads=2).bind(AXES)
            fill(binding, 4)
            binding.run()
            results.add(binding.outputs["out_sample"].tobytes())
        assert len(results) == 1

    def test_refuses_an_axis_without_a_size(self, engine: Any, name: str, tmp_path: Path) -> None:
        session = engine.open_session(model_for(name, tmp_path), threads=1)
        with pytest.raises(EngineError, match=r"'sample'.*Got: width"):
            session.bind({"batch": 1, "height": 4})

    def test_refuses_a_file_that_is_missing_or_damaged(self, engine: Any, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.onnx"
        damaged.write_bytes(b"no graph at all" * 9)
        for file in (tmp_path / "missing.onnx", damaged):
            with pytest.raises(EngineError, match=file.name):
                engine.open_session(file, threads=1)
            with pytest.raises(EngineError, match=file.name):
                engine.build(file, tmp_path / f"built{engine.suffix}", threads=1)
        assert not (tmp_path / f"built{engine.suffix}").exists()


class TestOnnxRuntime:
    @pytest.fixture
    def engine(self) -> Any:
        pytest.importorskip("onnxruntime")
        return find("runtimes.engines", "onnxruntime")

    def test_equals_the_library_called_directly(self, engine: Any, tmp_path: Path) -> None:
        import onnxruntime

        write_denoiser(tmp_path)
        binding = engine.open_session(tmp_path / DENOISE.model, threads=1).bind(AXES)
        fill(binding, 5)
        binding.run()
        plain = onnxruntime.InferenceSession(tmp_path / DENOISE.model, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(binding.outputs["out_sample"], plain.run(None, dict(binding.inputs))[0])

    def test_finds_out_the_size_of_an_axis_that_only_an_output_has(self, engine: Any, tmp_path: Path) -> None:
        write_decoder(tmp_path)
        binding = engine.open_session(tmp_path / DECODE.model, threads=1).bind(AXES)
        assert binding.outputs["sample"].shape == (2, 3, 12, 8)

    def test_a_run_allocates_no_arrays(self, engine: Any, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        binding = engine.open_session(tmp_path / DENOISE.model, threads=1).bind({"batch": 8, "height": 64, "width": 64})
        binding.run()
        tracemalloc.start()
        binding.run()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 10_000  # the output has 524,288 bytes; what is left is Python's frames

    def test_maps_every_exception_of_the_library(self, engine: Any) -> None:
        from onnxruntime.capi import onnxruntime_pybind11_state as native

        own = [v for v in vars(native).values() if isinstance(v, type) and issubclass(v, Exception)]
        assert len(own) >= 10
        for error in (*own, RuntimeError, ValueError, TypeError):
            with pytest.raises(EngineError, match=error.__name__), engine.mapped("Wrong"):
                raise error("reason")

    def test_refuses_sizes_that_the_graph_cannot_run(self, engine: Any, tmp_path: Path) -> None:
        halved = Component(
            "halved",
            "decode",
            "halved/model.onnx",
            (TensorSpec("x", "float32", ("rows",)), TensorSpec("y", "float32", ("columns",))),
            (TensorSpec("z", "float32", ("rows",)),),
        )
        write_onnx(tmp_path / halved.model, halved, [helper.make_node("Add", ["x", "y"], ["z"])], {})
        binding = engine.open_session(tmp_path / halved.model, threads=1).bind({"rows": 4, "columns": 3})
        with pytest.raises(EngineError, match="could not run"):
            binding.run()

    def test_refuses_a_type_that_numpy_lacks(self, engine: Any, tmp_path: Path) -> None:
        from onnx import TensorProto, save

        value = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, [1]) for n in "xy"]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "brain.onnx")
        with pytest.raises(EngineError, match="bfloat16"):
            engine.open_session(tmp_path / "brain.onnx", threads=1)

    def test_times_every_node_of_every_run_in_its_order(self, engine: Any, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        file = tmp_path / DENOISE.model
        feeds = {"sample": _random(1, 2, 4, 6, 4), "timestep": np.float32(3), "encoder_hidden_states": _random(2, 2, 8, 6)}
        first, second = engine.time_nodes([file, file], feeds, runs=7, threads=1)
        assert [node.operator for node in first][-1] == "Tanh"
        assert {"Conv", "MatMul"} <= {node.operator for node in first}
        assert [node.name for node in first] == [node.name for node in second]
        assert all(len(node.times_ms) == 7 and min(node.times_ms) >= 0 for node in first)
        assert 0 < sum(sum(node.times_ms) for node in first) < 7_000
        assert sorted(p.name for p in tmp_path.iterdir()) == ["unet"]

    def test_times_no_nodes_of_feeds_that_do_not_fit(self, engine: Any, tmp_path: Path) -> None:
        write_denoiser(tmp_path)
        with pytest.raises(EngineError, match="could not profile"):
            engine.time_nodes([tmp_path / DENOISE.model], {"sample": _random(1, 2, 4, 6, 4)}, runs=1, threads=1)

    def test_says_nothing(self, engine: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        write_denoiser(tmp_path)
        engine.build(tmp_path / DENOISE.model, tmp_path / f"unet{engine.suffix}", threads=1)
        engine.open_session(tmp_path / f"unet{engine.suffix}", threads=1).bind(AXES).run()
        assert capfd.readouterr() == ("", "")

    def test_a_built_engine_loads_faster(self, engine: Any, tmp_path: Path) -> None:
        wide = Component(
            "wide", "decode", "model.onnx", (TensorSpec("x0", "float32", (1, 128, 8, 8)),), (TensorSpec("x12", "float32", (1, 128, 8, 8)),)
        )
        nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], pads=[1, 1, 1, 1]) for i in range(12)]
        write_onnx(tmp_path / "model.onnx", wide, nodes, {f"w{i}": _random(i, 128, 128, 3, 3) for i in range(12)})
        built = tmp_path / f"wide{engine.suffix}"
        engine.build(tmp_path / "model.onnx", built, threads=1)

        def fastest_s(file: Path) -> float:
            times = []
            for _ in range(5):
                started = time.perf_counter()
                engine.open_session(file, threads=1)
                times.append(time.perf_counter() - started)
            return min(times)

        assert fastest_s(built) < fastest_s(tmp_path / "model.onnx")  # some ten times in a quiet hour


def test_threads_of_onnxruntime_stop_when_a_call_is_over() -> None:
    """Else they take cores from the graph that runs next (benchmarks/turns.py)."""
    options = _onnxruntime.session_options(None, optimize=True)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
