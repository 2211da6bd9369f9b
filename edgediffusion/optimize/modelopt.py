"""nvidia-modelopt's calibrators: ranges of balanced weights and inputs, by its own algorithms, in torch."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.state import LayerState
from edgediffusion.registry import require

ALGORITHMS = {"modelopt-max": "max", "modelopt-mse": "mse"}


def calibrated(
    module: torch.nn.Module,
    items: Sequence[Mapping[str, np.ndarray]],
    states: Mapping[str, LayerState],
    bits: Mapping[str, tuple[int, int]],
    algorithm: str,
    *,
    progress: Callable[[float], None] = lambda part: None,
) -> dict[str, LayerState]:
    """``states`` with the weights' amax, and clips of the inputs, that ModelOpt finds for the layers of ``bits``.

    ``algorithm`` is one of ``ALGORITHMS``: the largest values, or those of weights with the least squared error. The weights
    and inputs that it sees are balanced. ``module`` is left as it is. An input's amax bounds both sides of it.

    Raises:
        MissingExtra: nvidia-modelopt is not installed.
    """
    mtq = _library()
    network = copy.deepcopy(module)
    for name in bits:
        _balance(network.get_submodule(name), states[name].factors)

    def run(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for done, item in enumerate(items):
                model(**tensors(item))
                progress((done + 1) / len(items))

    with _quiet():
        mtq.quantize(network, {"quant_cfg": _quantizers(bits), "algorithm": ALGORITHMS[algorithm]}, run)
    return {name: _found(network.get_submodule(name), states[name], bits[name][1]) for name in bits}


def _balance(layer: torch.nn.Module, factors: np.ndarray) -> None:
    """Let the layer compute (x / f) (f w): what enters it is divided by a hook, which ModelOpt's own forward comes after."""
    f = torch.from_numpy(factors)
    weight: Any = layer.weight
    with torch.no_grad():
        weight.mul_(f.view(1, -1, *[1] * (weight.ndim - 2)))
    inverse = 1 / (f.view(1, -1, 1, 1) if isinstance(layer, torch.nn.Conv2d) else f)
    layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0] * inverse, *inputs[1:]))


def _quantizers(bits: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    config: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, (weights, activations) in bits.items():
        config.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": weights, "axis": 0}})
        if activations < 16:
            config.append({"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": activations, "axis": None}})
    return config


def _found(layer: Any, state: LayerState, activation_bits: int) -> LayerState:
    amax = layer.weight_quantizer.amax.detach().float().flatten().numpy()
    clip = state.input_clip
    if activation_bits < 16:
        low, high = replace(state, input_clip=1.0).input_range()
        clip = min(1.0, float(layer.input_quantizer.amax) / max(abs(low), abs(high), 1e-12))
    return replace(state, weight_amax=np.asarray(amax, np.float32), input_clip=clip)


def _library() -> Any:
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        return require("modelopt.torch.quantization", extra="optimize", purpose="This recipe's calibration")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt reports on stdout, which belongs to our results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
