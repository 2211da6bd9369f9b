"""Whole exports in other number formats, of the decoder alone: what is written, what it computes, what is told before.

Tolerances, of the largest value: float16 has 11 bits and bfloat16 8, and there are some twenty layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.export import export
from edgediffusion.registry import find

LATENT = np.random.default_rng(0).standard_normal((2, 4, 4, 6)).astype(np.float32)
KEPT = "vae.decoder.mid_block"


@pytest.fixture(scope="module")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """``made(dtype, *kept)``: the bundle of the decoder, once for each."""
    from edgediffusion.export.families import stable_diffusion as family

    known: dict[Any, Bundle] = {}
    parts = family.parts

    def get(dtype: str, *kept: str) -> Bundle:
        if (dtype, kept) not in known:
            output = tmp_path_factory.mktemp("dtypes") / "bundle"
            family.parts = lambda source: tuple(part for part in parts(source) if part.name == "vae_decoder")  # type: ignore[assignment]
            try:
                known[dtype, kept] = export(small, output, dtype=dtype, keep_float32=kept)  # type: ignore[arg-type]
            finally:
                family.parts = parts
        return known[dtype, kept]

    return get


def decoded(bundle: Bundle, engine: str = "onnxruntime") -> np.ndarray:
    session = find("runtimes.engines", engine).open_session(bundle.path / "vae_decoder" / "model.onnx")
    binding = session.bind({"batch": 2, "height": 4, "width": 6, "image_height": 8, "image_width": 12})
    binding.inputs["latent_sample"][...] = LATENT
    binding.run()
    return np.array(binding.outputs["sample"], np.float32)


def formats(bundle: Bundle) -> dict[str, int]:
    """The number formats of the weights, by name."""
    graph = onnx.load(bundle.path / "vae_decoder" / "model.onnx", load_external_data=False).graph
    return {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL}


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def test_bfloat16_speaks_float32_and_computes_in_bfloat16(made: Callable[..., Bundle]) -> None:
    bundle = made("bfloat16")
    (component,) = bundle.components
    assert {spec.dtype for spec in (*component.inputs, *component.outputs)} == {"float32"}
    assert set(formats(bundle).values()) == {TensorProto.BFLOAT16}
    pytest.importorskip("openvino", reason="ONNX Runtime's CPU provider has no convolution of bfloat16")
    assert 2**-16 < error(decoded(bundle, "openvino"), decoded(made("float32"))) < 20 * 2**-8


def test_a_kept_module_has_float32_weights_and_the_others_not(made: Callable[..., Bundle]) -> None:
    bundle = made("float16", KEPT)
    prefix = f"{KEPT.removeprefix('vae.')}."
    assert {name.startswith(prefix): kind for name, kind in formats(bundle).items()} == {
        True: TensorProto.FLOAT,
        False: TensorProto.FLOAT16,
    }
    assert bundle.components[0].inputs[0].dtype == "float16"
    assert bundle.history[0].arguments["keep_float32"] == [KEPT]
    assert error(decoded(bundle), decoded(made("float32"))) < 20 * 2**-11


def test_a_kept_network_takes_and_gives_float32_from_the_sources_file(made: Callable[..., Bundle]) -> None:
    bundle = made("float16", "vae")
    assert bundle.components[0].inputs[0].dtype == "float32"
    assert not (bundle.path / "vae_decoder" / "weights.safetensors").exists()
    np.testing.assert_array_equal(decoded(bundle), decoded(made("float32")))


def test_what_it_takes_is_told_before_the_work(
    small: Path, tmp_path: Path, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only("vae_decoder")
    told: list[Any] = []

    def stop(label: str, part: float) -> None:
        told.append(label)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(small, tmp_path / "bundle", dtype="float16", announce=told.append, progress=stop)
    size = sum(file.stat().st_size for file in (small / "vae").glob("*.safetensors"))
    assert told[0].read_bytes == size
    assert told[1:] == ["exporting vae_decoder"]
    monkeypatch.setattr("edgediffusion.export.estimate.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="too full"):
        export(small, tmp_path / "bundle", dtype="float16", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_refuses_modules_that_are_not_there(small: Path, tmp_path: Path, only: Callable[..., None]) -> None:
    only("vae_decoder")
    for name, message in (("unet", "no component 'unet'.*Allowed: vae"), ("vae.decoder.last", "'vae' has no module 'decoder.last'")):
        with pytest.raises(ArgumentError, match=message):
            export(small, tmp_path / "bundle", dtype="float16", keep_float32=(name,))
    assert list(tmp_path.iterdir()) == []


def test_cuts_in_bfloat16_are_joined_by_float32(small: Path, tmp_path: Path, only: Callable[..., None]) -> None:
    """What the whole network gives at the cut and the shallow graph takes is the same number, so both predict the same."""
    only("unet")
    cut = "up_blocks.1.resnets.0"
    bundle = export(small, tmp_path / "bundle", dtype="bfloat16", cuts=(cut,))
    assert {spec.dtype for component in bundle.components for spec in (*component.inputs, *component.outputs)} == {"float32"}
    pytest.importorskip("openvino", reason="ONNX Runtime's CPU provider has no convolution of bfloat16")
    axes = {"batch": 2, "height": 8, "width": 8}
    feeds = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 16, 32)}
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in feeds.items()} | {"timestep": np.float32([500])}
    found = {}
    for component in (*bundle.with_role("denoise"), *bundle.with_role("denoise.shallow")):
        binding = find("runtimes.engines", "openvino").open_session(bundle.path / component.model).bind(axes)
        for name, array in binding.inputs.items():
            array[...] = arrays[name]
        binding.run()
        arrays |= {name: array.copy() for name, array in binding.outputs.items()}
        found[component.role] = arrays["out_sample"]
    np.testing.assert_allclose(found["denoise.shallow"], found["denoise"], rtol=0, atol=1e-5)
