"""Tiny networks that were cut, as ONNX files in a real bundle: a UNet of two levels, and a transformer of three blocks.

Each graph is a list of nodes over the same named weights, so that what the parts compute together is what the whole computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper

from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle, Component, NoiseSchedule, Sampling, TensorSpec
from edgediffusion.runtimes.engines import NOT_SHARED, Binding, Session
from edgediffusion.runtimes.graph import Graph, open_components

from .tiny import DECODE, DENOISE, ENCODE, LATENT, SAMPLING, _random, write_decoder, write_encoder, write_onnx, write_tokenizer

CUT = "up_blocks.0.resnets.1"
BLOCKS = tuple(f"transformer_blocks.{k}" for k in range(3))
FLOW = replace(SAMPLING, prediction="flow", schedule=NoiseSchedule("flow", 1000), sampler="flow-euler")
_WIDTH = 4
_Graph = tuple[Component, list[NodeProto]]
_STREAM, _CONTEXT = ("batch", "height*width", _WIDTH), ("batch", 8, 6)
_WEIGHTS = {
    "conv_in": _random(10, 4, 4, 3, 3),
    "down": _random(11, 8, 4, 3, 3),
    "mid": _random(12, 8, 8, 3, 3),
    "up": _random(13, 8, 4, 2, 2),
    "conv_out": _random(14, 4, 8, 3, 3),
    "per_mille": np.array(1e-3, np.float32),
    "every": np.array([1, 2], np.int64),
    "last": np.array([1], np.int64),
    "tokens": np.array([0, _WIDTH, -1], np.int64),
    **{f"block{k}": _random(20 + k, _WIDTH, _WIDTH) for k in range(3)},
    **{f"context{k}": _random(30 + k, 6, 6) for k in range(3)},
}


def write_cut_unet(folder: Path, *, sampling: Sampling = SAMPLING) -> Bundle:
    """The whole network, and what is outside of its lower level."""
    feature, skip = TensorSpec(CUT, "float32", LATENT), TensorSpec(f"{CUT}.indicator", "float32", LATENT)
    whole = replace(DENOISE, outputs=(*DENOISE.outputs, feature, skip))
    shallow = Component(
        "unet_shallow", "denoise.shallow", "unet_shallow/model.onnx", (*DENOISE.inputs, feature), (*DENOISE.outputs, skip), cut=CUT
    )
    return _write(folder, sampling, [(whole, [*_outside(), *_lower(), *_joined()]), (shallow, [*_outside(), *_joined()])])


def write_cut_transformer(folder: Path, *, sampling: Sampling = FLOW, cuts: Sequence[str] = BLOCKS) -> Bundle:
    """The whole network, and head, tail and shallow graph of each cut."""
    whole = replace(DENOISE, name="transformer", model="transformer/model.onnx")
    graphs = [(whole, [*_embedding(), *_blocks(0, 3), *_unembedding()])]
    for cut in cuts:
        graphs += _parts(int(cut[-1]))
    return _write(folder, sampling, graphs)


def _parts(k: int) -> list[_Graph]:
    cut, (sample, *_) = BLOCKS[k], DENOISE.inputs
    stream, context = (
        TensorSpec(f"{cut}.hidden_states", "float32", _STREAM),
        TensorSpec(f"{cut}.encoder_hidden_states", "float32", _CONTEXT),
    )
    residual, indicator = (TensorSpec(f"{cut}.{name}", "float32", _STREAM) for name in ("residual", "indicator"))
    temb = TensorSpec("temb", "float32", ("batch", 1, 1))
    told = [_node("Mul", [f"{cut}.hidden_states", "temb"], indicator.name)] if k == 0 else []
    if k:
        told = [_node("Sub", [f"{cut}.hidden_states", f"{BLOCKS[0]}.hidden_states"], indicator.name)]
    moved = [_node("Add", [stream.name, residual.name], "block3.hidden_states")]

    def part(role: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> Component:
        return Component(f"{role}_{k}", f"denoise.{role}", f"{role}_{k}/model.onnx", tuple(inputs), tuple(outputs), cut=cut)

    added = [_node("Sub", ["block3.hidden_states", stream.name], residual.name)]
    return [
        (part("head", DENOISE.inputs, (stream, context, temb, indicator)), [*_embedding(), *_blocks(0, k), *told]),
        (part("tail", (stream, context, temb, sample), (*DENOISE.outputs, residual)), [*_blocks(k, 3), *_unembedding(), *added]),
        (part("shallow", (stream, temb, residual, sample), DENOISE.outputs), [*moved, *_unembedding()]),
    ]


def _outside() -> list[NodeProto]:
    clock = [_node("Cast", ["timestep"], "time", to=TensorProto.FLOAT), _node("Mul", ["time", "per_mille"], "clock")]
    text = [_node("ReduceMean", ["encoder_hidden_states", "every"], "text", keepdims=1), _node("Unsqueeze", ["text", "last"], "meaning")]
    return [
        *clock,
        *text,
        _node("Conv", ["sample", "conv_in"], "seen", pads=[1, 1, 1, 1]),
        _node("Add", ["seen", "clock"], "timed"),
        _node("Add", ["timed", "meaning"], f"{CUT}.indicator"),
    ]


def _lower() -> list[NodeProto]:
    return [
        _node("Conv", [f"{CUT}.indicator", "down"], "small", pads=[1, 1, 1, 1], strides=[2, 2]),
        _node("Tanh", ["small"], "bent"),
        _node("Conv", ["bent", "mid"], "middle", pads=[1, 1, 1, 1]),
        _node("ConvTranspose", ["middle", "up"], CUT, strides=[2, 2]),
    ]


def _joined() -> list[NodeProto]:
    return [
        _node("Concat", [CUT, f"{CUT}.indicator"], "both", axis=1),
        _node("Conv", ["both", "conv_out"], "told", pads=[1, 1, 1, 1]),
        _node("Tanh", ["told"], "out_sample"),
    ]


def _embedding() -> list[NodeProto]:
    return [
        _node("Reshape", ["sample", "tokens"], "rows"),
        _node("Transpose", ["rows"], f"{BLOCKS[0]}.hidden_states", perm=[0, 2, 1]),
        _node("Identity", ["encoder_hidden_states"], f"{BLOCKS[0]}.encoder_hidden_states"),
        _node("Cast", ["timestep"], "time", to=TensorProto.FLOAT),
        _node("Mul", ["time", "per_mille"], "clock"),
        _node("ReduceMean", ["encoder_hidden_states", "every"], "text", keepdims=1),
        _node("Add", ["text", "clock"], "temb"),
    ]


def _blocks(first: int, end: int) -> list[NodeProto]:
    nodes = []
    for k in range(first, end):
        here, after = BLOCKS[k], BLOCKS[k + 1] if k < 2 else "block3"
        nodes += [
            _node("MatMul", [f"{here}.hidden_states", f"block{k}"], f"product{k}"),
            _node("ReduceMean", [f"{here}.encoder_hidden_states", "every"], f"read{k}", keepdims=1),
            _node("Add", [f"product{k}", f"read{k}"], f"informed{k}"),
            _node("Add", [f"informed{k}", "temb"], f"timed{k}"),
            _node("Tanh", [f"timed{k}"], f"added{k}"),
            _node("Add", [f"{here}.hidden_states", f"added{k}"], f"{after}.hidden_states"),
            _node("MatMul", [f"{here}.encoder_hidden_states", f"context{k}"], f"told{k}"),
            _node("Tanh", [f"told{k}"], f"{after}.encoder_hidden_states"),
        ]
    return nodes


def _unembedding() -> list[NodeProto]:
    return [
        _node("Mul", ["block3.hidden_states", "temb"], "scaled"),
        _node("Transpose", ["scaled"], "columns", perm=[0, 2, 1]),
        _node("Shape", ["sample"], "shape"),
        _node("Reshape", ["columns", "shape"], "out_sample"),
    ]


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(kind, list(inputs), [output], **attributes)


def _write(folder: Path, sampling: Sampling, graphs: Sequence[_Graph]) -> Bundle:
    folder.mkdir(parents=True)
    write_encoder(folder)
    assert ENCODE.tokenizer is not None
    write_tokenizer(folder / ENCODE.tokenizer.file)
    write_decoder(folder)
    for component, nodes in graphs:
        used = {name for node in nodes for name in node.input}
        write_onnx(folder / component.model, component, list(nodes), {n: w for n, w in _WEIGHTS.items() if n in used})
    bundles.write(
        folder, family="tiny", components=(ENCODE, *(component for component, _ in graphs), DECODE), sampling=sampling, history=()
    )
    return Bundle.open(folder)


@dataclass
class Counted:
    """Loads graphs as a pipeline does, and remembers in which order they ran."""

    bundle: Bundle
    ran: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __call__(self, components: Sequence[Component]) -> Sequence[Graph]:
        self.loaded += [component.name for component in components]
        opened = open_components(self.bundle, components, target="onnx", threads=1)
        return [Graph(graph.component, _Session(graph.session, graph.name, self.ran)) for graph in opened]

    def times(self, *roles: str) -> int:
        """How often graphs of these roles ran."""
        return sum(self.bundle.component(name).role in roles for name in self.ran)


@dataclass
class _Session:
    session: Session
    name: str
    ran: list[str]

    def __post_init__(self) -> None:
        self.inputs, self.outputs = self.session.inputs, self.session.outputs

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> Binding:
        return _Binding(self.session.bind(axes, shared), self.name, self.ran)


class _Binding:
    def __init__(self, binding: Binding, name: str, ran: list[str]):
        self.inputs, self.outputs = binding.inputs, binding.outputs
        self._binding, self._name, self._ran = binding, name, ran

    def run(self) -> None:
        self._ran.append(self._name)
        self._binding.run()
