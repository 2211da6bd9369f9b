"""nvidia-modelopt's algorithms in torch: ranges of balanced weights and inputs, factors of channels, branches of low rank.

Its quantized modules do not go through the exporter, so only their numbers are taken: into the one quantization state, and from there
to any engine.
"""

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

from edgediffusion.optimize.balance import Balance, Network
from edgediffusion.optimize.integers import LOW_BITS
from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.state import LayerState
from edgediffusion.registry import require

ALGORITHMS = {"modelopt-max": "max", "modelopt-mse": "mse"}
ITEMS = 32  # of AWQ's search, which computes every layer twelve times for each


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
    mtq = library()
    network = copy.deepcopy(module)
    for name in bits:
        _balance(network.get_submodule(name), states[name].factors)

    def run(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for done, item in enumerate(items):
                model(**tensors(item))
                progress((done + 1) / len(items))

    with quiet():
        mtq.quantize(network, {"quant_cfg": _quantizers(bits), "algorithm": ALGORITHMS[algorithm]}, run)
    return {name: _found(network.get_submodule(name), states[name], bits[name][1]) for name in bits}


def smoothed(network: Network, algorithm: Mapping[str, Any]) -> dict[str, Balance]:
    """Factors of linear layers by one of ModelOpt's ways to scale channels: f = 1 / pre_quant_scale. It has none for convolutions.

    ``algorithm`` is ModelOpt's configuration of it. Layers that read one tensor get the mean of their scales, as ModelOpt's export of
    a checkpoint gives it to layers that an engine fuses.

    Raises:
        MissingExtra: nvidia-modelopt is not installed.
    """
    mtq = library()
    bits = {name: b for name, b in network.bits.items() if isinstance(network.module.get_submodule(name), torch.nn.Linear)}
    if not bits:
        return {}
    searches = algorithm["method"] == "awq_lite"
    items = network.items[:: max(1, len(network.items) // ITEMS)] if searches else network.items
    calls, passes = 0, 2 if searches else 1

    def run(model: torch.nn.Module) -> None:
        nonlocal calls
        with torch.no_grad():
            for item in items:
                model(**tensors(item))
                calls += 1
                network.progress(min(1.0, calls / (passes * len(items))))

    module = copy.deepcopy(network.module)
    with quiet():
        mtq.quantize(module, {"quant_cfg": _quantizers(bits, network.groups), "algorithm": dict(algorithm)}, run)
    scales = {name: _scale(module.get_submodule(name)) for name in bits}
    shared = {name: [scales[other] for other in network.layers[name].readers if other in scales] or [scales[name]] for name in bits}
    return {name: Balance((1 / np.mean(parts, axis=0)).astype(np.float32)) for name, parts in shared.items()}


def with_branches(network: Network, balances: Mapping[str, Balance]) -> dict[str, Balance]:
    """``balances`` with the branches that ModelOpt's SVDQuant puts beside linear layers of few bits.

    They are the largest singular values of the balanced weight, taken once; the authors of SVDQuant, and ``low_rank.py``, fit them
    and what is left in turn.
    """
    svd = require("modelopt.torch.quantization.model_calib", extra="optimize", purpose="This recipe's branches").svd
    found = dict(balances)
    for name, balance in balances.items():
        weight = network.layers[name].weight * balance.factors
        if network.bits[name][0] <= LOW_BITS and network.rank < min(weight.shape):
            up, down = svd(torch.from_numpy(weight), network.rank)
            found[name] = replace(balance, up=up.numpy(), down=down.numpy())
    return found


def _scale(layer: Any) -> np.ndarray:
    return np.asarray(layer.input_quantizer.pre_quant_scale.detach().float().flatten().numpy())


def _balance(layer: torch.nn.Module, factors: np.ndarray) -> None:
    """Let the layer compute (x / f) (f w): what enters it is divided by a hook, which ModelOpt's own forward comes after."""
    f = torch.from_numpy(factors)
    weight: Any = layer.weight
    with torch.no_grad():
        weight.mul_(f.view(1, -1, *[1] * (weight.ndim - 2)))
    inverse = 1 / (f.view(1, -1, 1, 1) if isinstance(layer, torch.nn.Conv2d) else f)
    layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0] * inverse, *inputs[1:]))


def _quantizers(bits: Mapping[str, tuple[int, int]], groups: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """``groups`` are sizes of the groups of inputs that a weight has a scale for each of; without, one for all."""
    config: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, (weights, activations) in bits.items():
        group = (groups or {}).get(name, 0)
        spread: dict[str, Any] = {"block_sizes": {-1: group}} if group else {"axis": 0}
        config.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": weights, **spread}})
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


def library() -> Any:
    """``modelopt.torch.quantization`` (MissingExtra)."""
    with quiet():
        return require("modelopt.torch.quantization", extra="optimize", purpose="This recipe's calibration")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ModelOpt reports on stdout, which belongs to our results, and warns of what is meant here, such as layers that it leaves out."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
