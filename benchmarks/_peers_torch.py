"""ModelOpt as it comes, in torch: modules that simulate its quantization, and a session that draws with them.

They do not go through the exporter (their own branch on data), and its quantizer of ONNX files has no int4 weights beside int8
activations: so there is quality to compare, and no time and no size. Layers that stay float are those of NVIDIA's example for diffusion.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from edgediffusion.bundle import Component
from edgediffusion.export.families import family_of
from edgediffusion.export.source import Source
from edgediffusion.optimize.modelopt import library
from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.recipe import Recipe, with_preset
from edgediffusion.runtimes.engines import NOT_SHARED, allocate

Feeds = Sequence[Mapping[str, np.ndarray]]
# By name: bits of weights and activations, and the algorithm. SmoothQuant with NVIDIA's 0.8 for diffusion; ModelOpt smooths int8 alone.
SETTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "w8a8-max": (8, 8, {"method": "max"}),
    "w8a8-smoothquant": (8, 8, {"method": "smoothquant", "alpha": 0.8}),
    "w4a8-max": (4, 8, {"method": "max"}),
    "w4a8-mse": (4, 8, {"method": "mse"}),
    "w4a8-awq": (4, 8, {"method": "awq_lite", "alpha_step": 0.1}),
    "w4a8-svdquant": (4, 8, {"method": "svdquant", "lowrank": 32}),
}
FEW = 64  # items of the methods that compute every layer many times for each


def quantized(source: Source, component: Component, items: Feeds, setting: str) -> tuple[torch.nn.Module, str]:
    """The component's network with ModelOpt's quantizers, calibrated on the items, and ModelOpt's version."""
    mtq = library()
    weights, activations, algorithm = SETTINGS[setting]
    part = next(p for p in family_of(source)[1].parts(source) if p.name == component.name)
    module = part.wrap(source.load(part.network))
    config: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weights, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": activations, "axis": None}},
    ]
    nvidia = with_preset(Recipe("nvidia", "int8", "int8"), "nvidia").exclude
    names = [name for name, _ in module.named_modules()]
    inner = {name: name.split(".", 1)[-1] for name in names}  # without the wrapper's own name for the network
    config += [
        {"quantizer_name": f"{name}.*quantizer", "enable": False} for name in names if any(re.search(e, inner[name]) for e in nvidia)
    ]
    chosen = items if algorithm["method"] in ("max", "mse", "smoothquant") else items[:: max(1, len(items) // FEW)]

    def run(model: torch.nn.Module) -> None:
        for feeds in chosen:
            model(**tensors(feeds))

    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(module, {"quant_cfg": config, "algorithm": algorithm}, run)
    return module, version("nvidia-modelopt")


class TorchSession:
    """A module of torch as an engine's session."""

    def __init__(self, module: torch.nn.Module, component: Component):
        self.module, self.inputs, self.outputs = module, component.inputs, component.outputs

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> _Binding:
        return _Binding(self.module, allocate(self.inputs, axes, shared), allocate(self.outputs, axes, shared))


class _Binding:
    def __init__(self, module: torch.nn.Module, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]):
        self._module, self.inputs, self.outputs = module, inputs, outputs

    def run(self) -> None:
        (output,) = self.outputs.values()
        with torch.no_grad():
            output[...] = self._module(**tensors(self.inputs)).numpy()
