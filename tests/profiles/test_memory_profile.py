"""Peak memory of bundles that want to be told different things."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle, Component, TensorSpec
from edgediffusion.profiles import memory, profile
from edgediffusion.runtimes.any_picture import any_picture
from tests.runtimes.tiny import DECODE, DENOISE, ENCODE, SAMPLING, with_input, write_bundle, write_decoder, write_onnx

LABELS = TensorSpec("class_labels", "int64", ("batch",))


def of_classes(folder: Path) -> Bundle:
    """A bundle whose denoiser takes a class and no text."""
    from onnx import TensorProto, helper

    plain = with_input(DENOISE, LABELS)
    denoise = replace(plain, inputs=tuple(spec for spec in plain.inputs if spec.name != "encoder_hidden_states"))
    nodes = [
        helper.make_node("Cast", ["class_labels"], ["class"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["class", "column"], ["column_of_classes"]),
        helper.make_node("Mul", ["column_of_classes", "little"], ["shade"]),
        helper.make_node("Add", ["sample", "shade"], ["sum"]),
        helper.make_node("Add", ["sum", "timestep"], ["clocked"]),
        helper.make_node("Tanh", ["clocked"], ["out_sample"]),
    ]
    folder.mkdir()
    write_onnx(folder / denoise.model, denoise, nodes, {"column": np.array([-1, 1, 1, 1]), "little": np.float32(0.01).reshape(())})
    write_decoder(folder)
    bundles.write(folder, family="tiny", components=(denoise, DECODE), sampling=replace(SAMPLING, classes=10), history=())
    return Bundle.open(folder)


def test_a_bundle_of_classes_is_drawn_with_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = of_classes(tmp_path / "bundle")
    used = memory.measure(bundle, steps=1, threads=1)
    assert used.peak_bytes > used.before_bytes > 0
    assert profile(bundle, runs=1, warmup=0, steps=1, threads=1).memory.peak_bytes > 0


@pytest.mark.parametrize(
    ("components", "wanted"),
    [
        ((ENCODE, DENOISE), {"prompt"}),
        ((DENOISE,), set()),
        ((with_input(DENOISE, LABELS),), {"class_labels"}),
        (
            (ENCODE, with_input(DENOISE, TensorSpec("sample", "float32", ("batch", 9, "height", "width")))),
            {"prompt", "image", "mask_image"},
        ),
    ],
)
def test_what_a_bundle_wants_to_be_told(tmp_path: Path, components: tuple[Component, ...], wanted: set[str]) -> None:
    bundle = replace(write_bundle(tmp_path / "bundle"), components=components)
    assert set(any_picture(bundle)) == wanted
