"""What overflows in float16 is found by running, and what is proposed contains it: a network of two blocks, one with large values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgediffusion.bundle import Bundle, Component, NoiseSchedule, Sampling, TensorSpec, Verb, write
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.overflow import LIMIT, find_overflow

PIXELS = ("batch", 3, "height", "width")
SAMPLING = Sampling(
    "epsilon", "none", NoiseSchedule("linear", 1000, 0.0001, 0.02), 3, 1, 1.0, 0.0, 8, 8, 1, False, "ddim", 4, 1.0
)  # fmt: skip


def denoiser(folder: Path, gains: dict[str, float]) -> Path:
    """conv_in, two blocks x + down(act(up(x))), conv_out; each a 1x1 convolution that multiplies by its gain."""
    nodes, tensors = [], []

    def conv(name: str, source: str) -> str:
        weight = np.eye(3, dtype=np.float32)[:, :, None, None] * np.float32(gains.get(name, 1.0))
        tensors.append(numpy_helper.from_array(np.tile(weight, (1, 1, 1, 1)), f"{name}.weight"))
        nodes.append(helper.make_node("Conv", [source, f"{name}.weight"], [f"{name}.out"], name=name))
        return f"{name}.out"

    x = conv("conv_in", "sample")
    for block in ("blocks.0", "blocks.1"):
        wide = conv(f"{block}.up", x)
        nodes.append(helper.make_node("LeakyRelu", [wide], [f"{block}.act"]))
        narrow = conv(f"{block}.down", f"{block}.act")
        nodes.append(helper.make_node("Add", [x, narrow], [f"{block}.sum"]))
        x = f"{block}.sum"
    nodes.append(helper.make_node("Conv", [x, "conv_out.weight"], ["out_sample"]))
    tensors.append(
        numpy_helper.from_array(np.eye(3, dtype=np.float32)[:, :, None, None] * np.float32(gains.get("conv_out", 1.0)), "conv_out.weight")
    )
    inputs = [
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, PIXELS),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
    ]
    graph = helper.make_graph(nodes, "main", inputs, [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, PIXELS)], tensors)
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    return folder / "model.onnx"


def bundle(path: Path, gains: dict[str, float], dtype: str = "float32") -> Bundle:
    path.mkdir()
    denoiser(path / "unet", gains)
    specs = (TensorSpec("sample", "float32", PIXELS), TensorSpec("timestep", "float32", (1,)))
    component = Component("unet", "denoise", "unet/model.onnx", specs, (TensorSpec("out_sample", "float32", PIXELS),))
    write(path, family="test", components=(component,), sampling=SAMPLING, history=(Verb("export", {"dtype": dtype}),))
    return Bundle.open(path)


def test_a_value_inside_a_block_keeps_the_block(tmp_path: Path) -> None:
    """blocks.1.up gives large values that its down makes small again: both layers and what is between, so the block."""
    made = bundle(tmp_path / "b", {"blocks.1.up": 1e5, "blocks.1.down": 1e-5})
    found = find_overflow(made, prompts=("", ""), steps=2)
    assert found.keep == ("unet.blocks.1",)
    assert {value.operator for value in found.values} == {"Conv", "LeakyRelu"}
    (part,) = found.parts
    assert part.largest > LIMIT
    assert part.headroom == pytest.approx(LIMIT / part.largest)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b"]


def test_a_stream_through_blocks_keeps_the_network(tmp_path: Path) -> None:
    found = find_overflow(bundle(tmp_path / "b", {"conv_in": 1e5, "conv_out": 1e-5}), steps=2)
    assert found.keep == ("unet",)


def test_nothing_overflows_and_the_margin_counts(tmp_path: Path) -> None:
    plain = find_overflow(bundle(tmp_path / "plain", {}), steps=2)
    assert (plain.keep, plain.values) == ((), ())
    largest = plain.parts[0].largest
    near = {"blocks.0.up": 0.6 * LIMIT / largest * 4, "blocks.0.down": 1e-5}
    assert find_overflow(bundle(tmp_path / "near", near), steps=2).keep == ("unet.blocks.0",)


def test_the_magnitudes_are_those_of_the_values(tmp_path: Path) -> None:
    """conv_in copies the sample: the largest magnitude there is that of the noise the loop starts from, at the least."""
    from edgediffusion.runtimes import Pipeline

    made = bundle(tmp_path / "b", {"blocks.0.down": 0.0, "blocks.1.down": 0.0, "conv_out": 0.5})
    seen: list[float] = []
    Pipeline.from_bundle(made)(seed=5, num_inference_steps=3, observe=lambda i, arrays: seen.append(float(np.abs(arrays["sample"]).max())))
    assert find_overflow(made, steps=3, seed=5).parts[0].largest == pytest.approx(max(seen))


def test_refuses_other_dtypes_and_no_prompts(tmp_path: Path) -> None:
    half = bundle(tmp_path / "half", {}, "float16")
    with pytest.raises(ArgumentError, match=r"is not of float32\. Got: float16.*--dtype fp32"):
        find_overflow(half)
    with pytest.raises(ArgumentError, match="no prompt"):
        find_overflow(bundle(tmp_path / "b", {}), prompts=())
