from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgediffusion.bundle import Bundle, Component, NoiseSchedule, Sampling, TensorSpec, Tokenizer, Verb, write

COMPONENTS = (
    Component(
        name="text_encoder",
        role="encode",
        model="text_encoder/model.onnx",
        inputs=(TensorSpec("input_ids", "int64", ("batch", 8)),),
        outputs=(TensorSpec("last_hidden_state", "float32", ("batch", 8, 16)),),
        tokenizer=Tokenizer("tokenizer/tokenizer.json", 8, 0),
        feeds={"last_hidden_state": "encoder_hidden_states"},
    ),
    Component(
        name="unet",
        role="denoise",
        model="unet/model.onnx",
        inputs=(TensorSpec("sample", "float32", ("batch", 4, "height", "width")), TensorSpec("timestep", "float32", ("batch",))),
        outputs=(TensorSpec("out_sample", "float32", ("batch", 4, "height", "width")),),
    ),
)
SAMPLING = Sampling(
    prediction="epsilon",
    guidance="classifier-free",
    schedule=NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012),
    latent_channels=4,
    downsampling=4,
    latent_scale=0.5,
    latent_shift=0.0,
    height=32,
    width=32,
    size_multiple=4,
    fixed_size=False,
    sampler="ddim",
    steps=20,
    guidance_scale=5.0,
)
HISTORY = (Verb("export", {"dtype": "float32", "opset": 23}, {"torch": "2.13.0"}),)


@pytest.fixture
def make_bundle() -> Callable[..., Bundle]:
    """Write a bundle whose graphs are a few bytes that no engine reads: enough for all that looks at bundles only."""

    def make(path: Path) -> Bundle:
        for component in COMPONENTS:
            (path / component.model).parent.mkdir(parents=True)
            (path / component.model).write_bytes(f"graph of {component.name}".encode())
        (path / "tokenizer").mkdir()
        (path / "tokenizer" / "tokenizer.json").write_text("{}\n", encoding="utf-8")
        write(path, family="stable-diffusion", components=COMPONENTS, sampling=SAMPLING, history=HISTORY)
        return Bundle.open(path)

    return make
