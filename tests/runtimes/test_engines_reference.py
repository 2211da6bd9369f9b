"""The shipped pipelines in the new engines: pictures by OpenVINO, and every component built by TensorRT for RTX for three kinds of GPU.

Traced as far as these tests need it: no image encoder, and of the transformer's pipeline the transformer alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgediffusion
from edgediffusion.bundle import Bundle
from edgediffusion.errors import EngineError
from edgediffusion.export import export
from edgediffusion.export.families import stable_diffusion, stable_diffusion_3
from edgediffusion.optimize import QuantizationState, calibrate, quantize
from edgediffusion.optimize.graph_file import load_graph
from edgediffusion.optimize.graph_layers import find_layers
from edgediffusion.optimize.recipe import load_recipe
from edgediffusion.optimize.state import LayerState, weights_digest
from edgediffusion.profiles.metrics.psnr import psnr_db
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.build import build
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.sizes import parse_sizes

REFERENCE = Path(edgediffusion.__file__).parent / "reference"
PROMPTS = ["a photo of a dark dress", "a photo of an ankle boot"]
OPTIONS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.0, "seed": 11}
GPUS = ("8.6", "8.9", "12.0")  # GeForce of the 30, 40 and 50 series
SIZES = parse_sizes("batch=2,height=8,width=8")

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def exported(name: str, family: Any, names: tuple[str, ...], output: Path, dtype: Any) -> Bundle:
    """A shipped pipeline with the named components alone."""
    parts = family.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "parts", lambda source: tuple(part for part in parts(source) if part.name in names))
        return export(REFERENCE / name, output, dtype=dtype)


@pytest.fixture(scope="module")
def fashion(folder: Path) -> Bundle:
    return exported("fashion", stable_diffusion, ("text_encoder", "unet", "vae_decoder"), folder / "float32", "float32")


@pytest.fixture(scope="module")
def half(folder: Path) -> Bundle:
    return exported("fashion", stable_diffusion, ("text_encoder", "unet", "vae_decoder"), folder / "float16", "float16")


@pytest.fixture(scope="module")
def transformer(folder: Path) -> Bundle:
    return exported("fashion-dit", stable_diffusion_3, ("transformer",), folder / "transformer", "float16")


@pytest.fixture(scope="module")
def state(folder: Path, fashion: Bundle) -> QuantizationState:
    return calibrate(fashion, output=folder / "state", samples=20, steps=20, prompts=PROMPTS, guidance_scale=5.0)


def made_up(bundle: Bundle, recipe: str) -> QuantizationState:
    """A state whose ranges nothing was measured for: which kernels are built does not depend on them."""
    (component,) = bundle.with_role("denoise")
    layers = {}
    for layer in find_layers(load_graph(bundle.path / component.model).graph):
        weight = layer.weight.const_value.numpy()
        weight = weight.T if layer.turned else weight
        inputs, outputs = np.ones(weight.shape[1] * layer.groups, np.float32), np.ones(len(weight), np.float32)
        amax = np.abs(weight.astype(np.float32)).reshape(len(weight), -1).max(1)
        layers[f"{component.name}/{layer.name}"] = LayerState(inputs, -4 * inputs, 4 * inputs, -4 * outputs, 4 * outputs, amax)
    return QuantizationState(weights_digest(bundle, component), {}, layers, asdict(load_recipe(recipe)))


@pytest.fixture(scope="module")
def by_openvino(folder: Path, fashion: Bundle) -> Bundle:
    return build(fashion, folder / "openvino", target="openvino-cpu")


@needs_openvino
class TestOpenVino:
    def test_float_pictures_are_those_of_onnx_runtime_to_2_of_255(self, by_openvino: Bundle) -> None:
        pictures = [Pipeline.from_bundle(by_openvino, target=t)(PROMPTS, **OPTIONS).pixels for t in ("openvino-cpu", "onnx")]
        assert np.abs(pictures[0] - pictures[1]).max() < 2 / 255  # 0.001 of 255 on the machine of docs/engines.md

    def test_int8_pictures_are_near_the_float_ones(self, folder: Path, by_openvino: Bundle, state: QuantizationState) -> None:
        coarse = quantize(by_openvino, state, folder / "int8-openvino", target="openvino-cpu")
        int8 = build(coarse, folder / "int8-built", target="openvino-cpu")
        pictures = [Pipeline.from_bundle(b, target="openvino-cpu")(PROMPTS, **OPTIONS).pixels for b in (int8, by_openvino)]
        decibels = [psnr_db(*pair) for pair in zip(*pictures, strict=True)]
        assert np.median(decibels) > 30, decibels  # some 43 on one machine: docs/engines.md


@needs_rtx
class TestTensorRTForRtx:
    @pytest.fixture
    def built(self, tmp_path: Path) -> Any:
        """``built(bundle, component)``: the size of its engine for all three GPUs."""
        engine = find("runtimes.engines", "tensorrt-rtx")

        def build_one(bundle: Bundle, name: str, gpus: tuple[str, ...] = GPUS) -> int:
            file = tmp_path / f"{name}{engine.suffix}"
            engine.build(bundle.path / bundle.component(name).model, file, compute_capabilities=gpus, shapes=SIZES)
            return file.stat().st_size

        return build_one

    @pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
    def test_every_component_in_float16(self, built: Any, half: Bundle, name: str) -> None:
        assert "float16" in read_header(half.path / half.component(name).model).formats
        assert built(half, name) > 1e6

    def test_attention_in_float32_which_has_no_kernel_of_its_own(self, built: Any, fashion: Bundle) -> None:
        assert built(fashion, "text_encoder") > 1e6

    def test_the_transformer_in_float16_and_int8(self, built: Any, transformer: Bundle, tmp_path: Path) -> None:
        exact = built(transformer, "transformer")
        int8 = quantize(transformer, made_up(transformer, "int8"), tmp_path / "int8", target="rtx-4090")
        assert "int8" in read_header(int8.path / "transformer/model.onnx").formats
        assert min(exact, built(int8, "transformer")) > 1e6

    @pytest.mark.parametrize(("recipe", "gpus"), [("int8", GPUS), ("fp8", ("8.9", "12.0"))])
    def test_the_unet_quantized(self, built: Any, half: Bundle, tmp_path: Path, recipe: str, gpus: tuple[str, ...]) -> None:
        coarse = quantize(half, made_up(half, recipe), tmp_path / recipe, target="rtx-4090")
        assert recipe in read_header(coarse.path / "unet/model.onnx").formats
        assert built(coarse, "unet", gpus) > 1e6
        if recipe == "fp8":
            with pytest.raises(EngineError, match=r"'rtx-3060' has no kernels for what 'unet' is computed in. Got: fp8"):
                build(coarse, tmp_path / "built", target="rtx-3060")
            with pytest.raises(EngineError, match=r"could not build 'unet/model.onnx'. Got: .*sm86"):  # what the library itself would say
                built(coarse, "unet")
