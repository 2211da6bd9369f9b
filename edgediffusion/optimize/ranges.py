"""Ranges of weights and activations: nvidia-modelopt's quantizers run over calibration items in torch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from edgediffusion.optimize.state import LayerRanges, TensorRange
from edgediffusion.registry import require

_QUANTIZER = {"num_bits": 8, "axis": None}
_CONFIG = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": _QUANTIZER},
        {"quantizer_name": "*output_quantizer", "cfg": _QUANTIZER},
    ],
    "algorithm": "max",
}

Feeds = Mapping[str, np.ndarray]


def measure(
    module: torch.nn.Module, items: Iterable[Feeds], *, progress: Callable[[int], None] = lambda done: None
) -> dict[str, LayerRanges]:
    """Ranges of every convolution and linear layer of ``module`` over the items, by module path.

    ``module`` is called with the arrays of an item as keyword tensors. Its quantizers are left in place, so give a
    module that nothing else uses.
    """
    mtq = _modelopt()
    extremes: dict[str, list[float]] = {}
    layers = {name: m for name, m in module.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}

    def run(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for done, item in enumerate(items):
                model(**{name: torch.from_numpy(array) for name, array in item.items()})
                progress(done + 1)

    with _observed(layers, extremes), _quiet():
        mtq.quantize(module, _CONFIG, run)
    quantized = dict(module.named_modules())
    return {name: _ranges(quantized[name], extremes, name) for name in layers if f"{name}:input" in extremes}


@contextlib.contextmanager
def _observed(layers: Mapping[str, torch.nn.Module], extremes: dict[str, list[float]]) -> Iterator[None]:
    """Record the lowest and highest value of each layer's input and output; amax alone loses the sign."""

    def note(key: str, tensor: torch.Tensor) -> None:
        low, high = (v.item() for v in torch.aminmax(tensor))
        known = extremes.setdefault(key, [low, high])
        extremes[key] = [min(known[0], low), max(known[1], high)]

    def hook(name: str) -> Callable[..., None]:
        def record(_module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            note(f"{name}:input", inputs[0])
            note(f"{name}:output", output)

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ranges(layer: Any, extremes: Mapping[str, list[float]], name: str) -> LayerRanges:
    def tensor_range(which: str) -> TensorRange:
        low, high = extremes[f"{name}:{which}"]
        return TensorRange(low, high, float(getattr(layer, f"{which}_quantizer").amax))

    return LayerRanges(tensor_range("input"), tensor_range("output"), tuple(layer.weight_quantizer.amax.flatten().tolist()))


def _modelopt() -> Any:
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        return require("modelopt.torch.quantization", extra="optimize", purpose="Calibration")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt reports on stdout, which belongs to our results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
