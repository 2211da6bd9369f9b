"""Tiny networks for the tests of the runtime: as ONNX files in a real bundle, and as plain functions in fake sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, processors

from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle, Component, NoiseSchedule, Sampling, TensorSpec, Tokenizer
from edgediffusion.runtimes.engines import NOT_SHARED, allocate

TOKENS, WIDTH = 8, 6
WORDS = ("a", "red", "blue", "shirt", "shoe", "of", "cat", "dog", "photo", "very", "big")
STABLE_DIFFUSION = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, spacing="leading", steps_offset=1, set_alpha_to_one=False)
SAMPLING = Sampling(
    prediction="epsilon",
    guidance="classifier-free",
    schedule=STABLE_DIFFUSION,
    latent_channels=4,
    downsampling=2,
    latent_scale=0.5,
    latent_shift=0.1,
    height=16,
    width=16,
    size_multiple=4,
    fixed_size=False,
    sampler="ddim",
    steps=3,
    guidance_scale=5.0,
)

ENCODE = Component(
    "text_encoder",
    "encode",
    "text_encoder/model.onnx",
    (TensorSpec("input_ids", "int64", ("batch", TOKENS)),),
    (TensorSpec("last_hidden_state", "float32", ("batch", TOKENS, WIDTH)),),
    Tokenizer("tokenizer/tokenizer.json", TOKENS, pad_id=1),
    {"last_hidden_state": "encoder_hidden_states"},
)
LATENT = ("batch", 4, "height", "width")
DENOISE = Component(
    "unet",
    "denoise",
    "unet/model.onnx",
    (
        TensorSpec("sample", "float32", LATENT),
        TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", "float32", ("batch", TOKENS, WIDTH)),
    ),
    (TensorSpec("out_sample", "float32", LATENT),),
)
DECODE = Component(
    "vae_decoder",
    "decode",
    "vae_decoder/model.onnx",
    (TensorSpec("latent_sample", "float32", LATENT),),
    (TensorSpec("sample", "float32", ("batch", 3, "image_height", "image_width")),),
)


def write_tokenizer(file: Path) -> None:
    """Whole words, a start and an end mark as CLIP has them."""
    words = ["<start>", "<end>", "<unknown>", *WORDS]
    tokenizer = Library(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    tokenizer.add_special_tokens(["<start>", "<end>"])
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))


def write_onnx(file: Path, component: Component, nodes: list[object], weights: Mapping[str, np.ndarray]) -> None:
    def value(spec: TensorSpec) -> object:
        return helper.make_tensor_value_info(spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), list(spec.shape))

    graph = helper.make_graph(
        nodes,
        component.name,
        [value(s) for s in component.inputs],
        [value(s) for s in component.outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    save(model, str(file), save_as_external_data=True, location=file.stem + ".weights", size_threshold=256)


def _random(seed: int, *shape: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.3).astype(np.float32)


def write_encoder(folder: Path, component: Component = ENCODE) -> None:
    node = helper.make_node("Gather", ["table", "input_ids"], [component.outputs[0].name])
    write_onnx(folder / component.model, component, [node], {"table": _random(1, len(WORDS) + 3, WIDTH)})


def write_denoiser(folder: Path, component: Component = DENOISE) -> None:
    """tanh(conv(sample) + w mean(conditions) + timestep / 1000)."""
    nodes = [
        helper.make_node("Conv", ["sample", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["timestep"], ["time"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["time", "per_mille"], ["clock"]),
        helper.make_node("Reshape", ["clock", "column"], ["clocks"]),
        helper.make_node("ReduceMean", ["encoder_hidden_states", "token_axis"], ["said"], keepdims=0),
        helper.make_node("MatMul", ["said", "projection"], ["meant"]),
        helper.make_node("Unsqueeze", ["meant", "picture_axes"], ["everywhere"]),
        helper.make_node("Sum", ["features", "everywhere", "clocks"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["out_sample"]),
    ]
    weights = {
        "kernel": _random(2, 4, 4, 3, 3),
        "projection": _random(3, WIDTH, 4),
        "per_mille": np.float32(0.001).reshape(()),
        "column": np.array([-1, 1, 1, 1]),
        "token_axis": np.array([1]),
        "picture_axes": np.array([2, 3]),
    }
    write_onnx(folder / component.model, component, nodes, weights)


def write_decoder(folder: Path, component: Component = DECODE) -> None:
    channels = component.outputs[0].shape[1]
    assert isinstance(channels, int)
    node = helper.make_node("ConvTranspose", ["latent_sample", "kernel"], ["sample"], strides=[2, 2])
    write_onnx(folder / component.model, component, [node], {"kernel": _random(4, 4, channels, 2, 2)})


def write_bundle(
    folder: Path, *, sampling: Sampling | None = SAMPLING, components: tuple[Component, ...] = (ENCODE, DENOISE, DECODE)
) -> Bundle:
    """A bundle with real ONNX files, each a network of one or a few nodes with random weights."""
    writers = {"encode": write_encoder, "denoise": write_denoiser, "decode": write_decoder}
    folder.mkdir(parents=True)
    for component in components:
        writers[component.role](folder, component)
        if component.tokenizer is not None:
            write_tokenizer(folder / component.tokenizer.file)
    bundles.write(folder, family="tiny", components=components, sampling=sampling, history=())
    return Bundle.open(folder)


Function = Callable[[Mapping[str, np.ndarray]], np.ndarray | Mapping[str, np.ndarray]]  # the only output, or all by name


@dataclass
class FakeBinding:
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    session: FakeSession

    def run(self) -> None:
        feeds = {name: array.copy() for name, array in self.inputs.items()}
        self.session.calls.append(feeds)
        found = self.session.function(feeds)
        for name, array in found.items() if isinstance(found, Mapping) else [(next(iter(self.outputs)), found)]:
            self.outputs[name][...] = array


@dataclass
class FakeSession:
    """A Python function as a session, which remembers what it was called with and which shapes were bound."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    function: Function

    def __post_init__(self) -> None:
        self.calls: list[dict[str, np.ndarray]] = []
        self.bound: list[dict[str, int]] = []

    @classmethod
    def of(cls, component: Component, function: Function) -> FakeSession:
        return cls(component.inputs, component.outputs, function)

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> FakeBinding:
        self.bound.append(dict(axes))
        inputs, outputs = (allocate(specs, axes, shared) for specs in (self.inputs, self.outputs))
        return FakeBinding(inputs, outputs, self)


def with_input(component: Component, *specs: TensorSpec) -> Component:
    """The component with further inputs, or with others in place of those of the same name."""
    named = {spec.name: spec for spec in (*component.inputs, *specs)}
    return replace(component, inputs=tuple(named.values()))
