"""nvidia-modelopt's choice of a format for each layer (``auto_quantize``), written as lists of a recipe.

Of every layer and format it wants the loss in first order: sum (g d)^2 over the layer's output, d being what quantizing changes and g the
gradient of a loss. Which formats have the least sum within the mean of bits is a linear program. Its losses are those of language
models; of a network that predicts noise, a squared error to itself has no gradient. Here the loss is <v, y>, with v drawn from a
standard normal law for every call: in expectation, g^2 is then the diagonal of J^T J, so that (g d)^2 estimates the squared error of what
the network predicts, y. Where an item has two rows, y has the guided prediction beside them.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.modelopt import library, quiet
from edgediffusion.optimize.observe import LAYERS, layers_of, tensors
from edgediffusion.optimize.recipe import Recipe

ITEMS = 64
Feeds = Mapping[str, np.ndarray]


def choose_formats(
    module: torch.nn.Module,
    items: Sequence[Feeds],
    recipe: Recipe,
    *,
    prefix: str = "",
    seed: int = 0,
    guidance_scale: float | None = None,
    progress: Callable[[str, float], None] = lambda label, part: None,
) -> Recipe:
    """``recipe`` with the layers that ModelOpt keeps float in ``exclude``, and those that it gives 8 bits in ``eight``.

    Its mean of bits is over all weights of convolutions and linear layers, 16 for those that stay float anyway. The recipe's own
    ``exclude`` and ``eight`` stand. Module paths are those of ``module`` without ``prefix``; it is left as it is.

    Raises:
        ArgumentError: the layers that stay float have too many bits already. MissingExtra: nvidia-modelopt is not installed.
    """
    network = copy.deepcopy(module)
    network.requires_grad_(True)
    sizes = {name: layer.weight.numel() for name, layer in layers_of(network).items() if isinstance(layer, LAYERS)}
    reached = _reached(network, items[0])
    fixed = {name for name in sizes if name not in reached or recipe.excludes(name.removeprefix(prefix))}
    _check_reach(recipe, sizes, fixed, prefix)
    formats = _formats(recipe)
    eight = [name for name in sizes if name not in fixed and recipe.bits(name.removeprefix(prefix))[0] > min(formats)]
    settled = {"module_name_patterns": eight, "quantization_formats": [formats[8]], "allow_no_quant": False}
    chosen = [tensors(items[i]) for i in np.unique(np.linspace(0, len(items) - 1, ITEMS).astype(int))]
    with _searching() as mtq:
        _, state = mtq.auto_quantize(
            network,
            {"effective_bits": float(recipe.effective_bits)},
            list(formats.values()),
            chosen,
            _forward(len(chosen) * (len(formats) + 1), progress),
            loss_func=_loss(seed, guidance_scale),
            disabled_layers=sorted(fixed) or None,
            module_search_spaces=[settled] if eight else None,
            num_calib_steps=len(chosen),
            num_score_steps=len(chosen),
        )
    found = {name.removesuffix(".quant_recipe"): form.num_bits for name, form in state["best"]["recipe"].items()}
    return _written(recipe, {name.removeprefix(prefix): bits for name, bits in found.items() if name not in fixed})


def _forward(calls: int, progress: Callable[[str, float], None]) -> Callable[..., torch.Tensor]:
    done = 0

    def forward(model: torch.nn.Module, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        nonlocal done
        done += 1
        progress("choosing formats", min(1.0, done / calls))
        output: torch.Tensor = model(**feeds)
        return output

    return forward


def _loss(seed: int, guidance_scale: float | None) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def loss(output: torch.Tensor, _feeds: object) -> torch.Tensor:
        seen = [output]
        if guidance_scale is not None and len(output) == 2:
            seen.append(output[:1] + guidance_scale * (output[1:] - output[:1]))
        return torch.stack([(y * torch.randn(y.shape, generator=generator)).sum() for y in seen]).sum()

    return loss


def _formats(recipe: Recipe) -> dict[int, dict[str, Any]]:
    """ModelOpt's configurations by bits of a weight: the recipe's, and that of its ``eight``."""
    eight = replace(recipe, eight=("",))
    found = {}
    for weights, activations in (recipe.bits(""), eight.bits("")):
        quantizers: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        quantizers.append({"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weights, "axis": 0}})
        if activations < 16:
            quantizers.append({"quantizer_name": "*input_quantizer", "cfg": {"num_bits": activations, "axis": None}})
        found[weights] = {"quant_cfg": quantizers, "algorithm": "max"}
    return found


def _reached(module: torch.nn.Module, item: Feeds) -> set[str]:
    found: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda _m, _x, name=name: found.add(name)) for name, m in layers_of(module).items()]
    with torch.no_grad():
        module(**tensors(item))
    for handle in handles:
        handle.remove()
    return found


def _check_reach(recipe: Recipe, sizes: Mapping[str, int], fixed: set[str], prefix: str) -> None:
    bits = {name: 16 if name in fixed else recipe.bits(name.removeprefix(prefix))[0] for name in sizes}
    least = sum(sizes[name] * bits[name] for name in sizes) / sum(sizes.values())
    if recipe.effective_bits < least:
        raise ArgumentError(
            f"'{recipe.name}' asks for fewer bits a weight than its layers can have",
            got=f"effective_bits = {recipe.effective_bits}",
            allowed=f"{least:.2f}..16, since {len(fixed)} of {len(sizes)} layers stay float",
            do="Ask for more bits, or let fewer layers stay float.",
        )


def _written(recipe: Recipe, bits: Mapping[str, int]) -> Recipe:
    def names(wanted: int) -> tuple[str, ...]:
        return tuple(f"^{re.escape(name)}$" for name in sorted(bits) if bits[name] == wanted)

    eight = () if recipe.bits("")[0] == 8 else names(8)
    return replace(recipe, exclude=(*recipe.exclude, *names(16)), eight=(*recipe.eight, *eight))


@contextlib.contextmanager
def _searching() -> Iterator[Any]:
    """ModelOpt, without its bars of progress, and without its own attention, which has no gradient."""
    mtq = library()
    from modelopt.torch.quantization import algorithms
    from modelopt.torch.quantization.plugins.diffusion import diffusers

    places: tuple[tuple[Any, str, object], ...] = (
        (algorithms, "tqdm", lambda iterable, **_options: iterable),
        (diffusers._QuantAttention, "_functionals_to_replace", []),
    )
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        with quiet():
            yield mtq
    finally:
        for (owner, name, _), value in zip(places, before, strict=True):
            setattr(owner, name, value)
