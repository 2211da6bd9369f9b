"""What engines are built for: ranges of sizes by axis name, and what an ONNX file says of itself."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, load, save

from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import ArgumentError, EngineError
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.sizes import SizeRange, check_sizes, parse_sizes, range_of, ranges_for, usual_sizes

from .tiny import DECODE, DENOISE, ENCODE, SAMPLING, write_bundle, write_decoder, write_denoiser, write_encoder, write_onnx


def test_sizes_are_read_as_they_are_written() -> None:
    sizes = parse_sizes("batch=1:2:4, height=64,image_width=512")
    assert sizes == {"batch": SizeRange(1, 2, 4), "height": SizeRange(64, 64, 64), "image_width": SizeRange(512, 512, 512)}
    assert ",".join(f"{axis}={size}" for axis, size in sizes.items()) == "batch=1:2:4,height=64,image_width=512"


@pytest.mark.parametrize(
    "text", ["batch", "batch=", "batch=1:2", "batch=1:2:3:4", "batch=-1", "batch=1,batch=2", "=1", "batch=1;height=2", ","]
)
def test_sizes_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"Sizes cannot be read. Got: '.*'. Allowed: AXIS=SMALLEST:USUAL:LARGEST"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["batch=2:1:4", "batch=1:5:4", "batch=0"])
def test_a_range_that_does_not_rise_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="does not rise"):
        parse_sizes(text)


def test_usual_sizes_are_those_of_one_picture_and_of_two(tmp_path: Path) -> None:
    guided = usual_sizes(write_bundle(tmp_path / "guided"))
    assert guided["batch"] == SizeRange(1, 2, 4)  # two rows a picture
    assert (guided["height"].usual, guided["width"].usual) == (8, 8)  # 16 pixels, latents of half of that
    assert guided["image_height"] == SizeRange(16, 16, 16)
    alone = usual_sizes(write_bundle(tmp_path / "alone", sampling=replace(SAMPLING, guidance="none")))
    assert alone["batch"] == SizeRange(1, 1, 2)
    assert usual_sizes(write_bundle(tmp_path / "part", sampling=None)) == {}


def test_texts_with_something_before_them_are_longer_than_those_without(tmp_path: Path) -> None:
    assert ENCODE.tokenizer is not None
    encode = replace(ENCODE, tokenizer=replace(ENCODE.tokenizer, length=8, prefix="a photo of", prefix_tokens=3))
    bundle = write_bundle(tmp_path / "bundle", components=(encode, DENOISE, DECODE))
    assert usual_sizes(bundle)["tokens"] == SizeRange(8, 11, 11)
    assert bundle.component(encode.name).tokenizer == encode.tokenizer  # as it was written


def test_a_part_of_an_axis_has_a_part_of_its_range() -> None:
    sizes = {"height": SizeRange(8, 16, 32), "width": SizeRange(8, 8, 8)}
    assert range_of("height/2", sizes) == SizeRange(4, 8, 16)
    assert range_of("height*width/4", sizes) == SizeRange(16, 32, 64)
    assert range_of("depth", sizes) is None
    assert range_of("height/3", sizes) is None


def test_an_axis_without_a_range_is_named_with_the_option_that_gives_one() -> None:
    specs = (TensorSpec("x", "float32", ("batch", "frames", 3)),)
    with pytest.raises(
        EngineError, match=r"'video' has axes without a range of sizes. Got: frames. Say what they may be: --shapes frames="
    ):
        ranges_for(specs, {"batch": SizeRange(1, 1, 1)}, "video")


def test_a_size_out_of_its_range_is_refused_with_the_command_that_builds_for_it() -> None:
    ranges = {"batch": SizeRange(1, 2, 4), "height": SizeRange(8, 8, 8), "height/2": SizeRange(4, 4, 4)}
    check_sizes({"batch": 4, "height": 8, "elsewhere": 99}, ranges, "unet")
    with pytest.raises(EngineError, match=r"Got: batch 6. Allowed: batch 1 to 4. .*--shapes batch=1:2:6,height=8 -o NEW"):
        check_sizes({"batch": 6, "height": 8, "height/2": 4}, ranges, "unet")


@pytest.mark.parametrize(("write", "component"), [(write_encoder, ENCODE), (write_denoiser, DENOISE), (write_decoder, DECODE)])
def test_a_header_says_what_the_onnx_package_says(tmp_path: Path, write: object, component: object) -> None:
    write(tmp_path)  # type: ignore[operator]
    header = read_header(tmp_path / component.model)  # type: ignore[attr-defined]
    assert (header.inputs, header.outputs) == (component.inputs, component.outputs)  # type: ignore[attr-defined]
    assert header.opset == load(tmp_path / component.model, load_external_data=False).opset_import[0].version  # type: ignore[attr-defined]
    assert "float32" in header.formats


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.BFLOAT16, "bfloat16"),
        (TensorProto.UINT8, "int8"),
        (TensorProto.INT8, "int8"),
        (TensorProto.INT4, "int4"),
        (TensorProto.UINT4, "int4"),
        (TensorProto.FLOAT8E4M3FN, "fp8"),
        (TensorProto.FLOAT4E2M1, "fp4"),
    ],
)
def test_a_header_knows_every_number_format(tmp_path: Path, kind: int, name: str) -> None:
    weight = TensorProto(name="w", data_type=kind, dims=[2], raw_data=b"\0" * 4)
    value = [helper.make_tensor_value_info(n, TensorProto.INT64, [None, "rows"]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:], [weight])
    imports = [helper.make_opsetid("com.example", 3), helper.make_opsetid("", 23)]
    save(helper.make_model(graph, opset_imports=imports, ir_version=11), tmp_path / "model.onnx")
    header = read_header(tmp_path / "model.onnx")
    assert header.formats == (name,)
    assert header.opset == 23
    assert header.inputs == (TensorSpec("x", "int64", ("x.0", "rows")),)


def test_a_weight_that_is_listed_as_an_input_is_none(tmp_path: Path) -> None:
    component = replace(DENOISE, inputs=(*DENOISE.inputs, TensorSpec("w", "float32", (2,))))
    write_onnx(tmp_path / "m.onnx", component, [helper.make_node("Identity", ["sample"], ["out_sample"])], {"w": np.ones(2, np.float32)})
    assert read_header(tmp_path / "m.onnx").inputs == DENOISE.inputs


def test_a_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "brain.onnx")
    with pytest.raises(EngineError, match=r"The tensor 'x' has a type that NumPy lacks. Got: bfloat16"):
        read_header(tmp_path / "brain.onnx")


def test_a_damaged_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    write_denoiser(tmp_path)
    content = (tmp_path / DENOISE.model).read_bytes()
    rng = np.random.default_rng(0)
    broken = [content[:cut] for cut in range(0, len(content), 37)]
    for at in rng.integers(0, len(content), 60):
        broken.append(content[:at] + bytes([int(rng.integers(256))]) + content[at + 1 :])
    for number, data in enumerate(broken):
        file = tmp_path / f"{number}.onnx"
        file.write_bytes(data)
        with suppress(EngineError):  # and nothing else; a changed byte of a weight is not seen here
            read_header(file)
    with pytest.raises(EngineError, match=r"missing or is no ONNX file"):
        read_header(tmp_path / "none.onnx")
