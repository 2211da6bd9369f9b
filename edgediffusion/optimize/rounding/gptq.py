"""Rounding that makes up for itself: GPTQ (Frantar et al. 2022, 2210.17323), layer by layer, without gradients.

Columns of the weight are rounded one after the other; what a column loses is taken from those that are still to come, by the
inverse of H = X X^T, the second moments of the layer's input (equations 2 and 3; the Cholesky form of its algorithm 1). A
convolution is the matrix product over its patches. Inputs are those of the float network, balanced. The bias, ours, is one
column more, the last, of an input that is always 1: it is not rounded, and takes what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from edgediffusion.optimize.integers import LOW_BITS, spread, weight_scale
from edgediffusion.optimize.observe import LAYERS, tensors
from edgediffusion.optimize.rounding import Feeds, Job
from edgediffusion.optimize.state import LayerState

DAMPING = 0.01  # of H's mean diagonal, on its diagonal: the authors' percdamp
LARGEST = 4608  # columns of one H, 512 channels of 3 x 3: beyond it, H is taken as a diagonal of blocks of whole channels
BUDGET = 2**30  # bytes of all H that are gathered in one pass over the items
ITEMS = 64  # each gives a column for every pixel or token: enough for any H here


def round_weights(job: Job) -> dict[str, LayerState]:
    chosen = {name: layer for name, layer in _layers(job).items() if job.bits(name)[0] <= LOW_BITS}
    items = job.items[:: max(1, len(job.items) // ITEMS)]
    found: dict[str, LayerState] = {}
    for group in _groups(chosen):
        moments = _moments(job, {name: chosen[name] for name in group}, items)
        for name in group:
            bits = job.bits(name)[0]
            layer, state = chosen[name], job.layers[name]
            weight = torch.from_numpy(state.without_branch((_matrix(layer) * _columns(layer, state.factors)).numpy()))
            step = torch.from_numpy(spread(weight_scale(state.weight_amax, bits), tuple(weight.shape))).double()
            codes, bias = gptq(weight, moments.pop(name), step.expand(weight.shape), 2 ** (bits - 1) - 1, _bias(layer))
            found[name] = replace(state, codes=_shaped(codes, layer), bias=None if bias is None else bias.float().numpy())
            job.progress(len(found) / len(chosen))
    return found


def gptq(
    weight: torch.Tensor, moments: Sequence[torch.Tensor], step: torch.Tensor, top: int, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes [out, columns] of ``weight`` [out, columns], float64, for steps of its shape; and the bias [out], if there is one.

    ``moments`` are H of consecutive columns, [n, n] each, that add up to all of them, the bias' own the last.
    """
    columns = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    read, at = torch.empty_like(columns), 0
    for h in moments:
        end = at + len(h)
        read[:, at:end] = _block(columns[:, at:end].clone(), h, step[:, at:end], top)
        at = end
    return read[:, : weight.shape[1]], None if bias is None else read[:, -1]


def _block(weight: torch.Tensor, h: torch.Tensor, step: torch.Tensor, top: int, *, lazy: int = 128) -> torch.Tensor:
    """Codes of the columns of one H that have steps, and the values of the one after them.

    Within ``lazy`` columns the rest is corrected at once, beyond them in one product: the authors' lazy batches.
    """
    codes, rounded = weight, step.shape[1]  # a column is not needed any more once it is rounded
    damped = h.clone()
    damped.diagonal()[:rounded] += max(DAMPING * float(h.diagonal()[:rounded].mean()), 1e-12)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, rounded, lazy):
        end = min(start + lazy, rounded)
        errors = torch.empty(len(weight), end - start, dtype=weight.dtype)
        for i in range(start, end):
            column = torch.clamp(torch.round(weight[:, i] / step[:, i]), -top, top)
            errors[:, i - start] = (weight[:, i] - column * step[:, i]) / upper[i, i]
            codes[:, i] = column
            weight[:, i + 1 : end] -= torch.outer(errors[:, i - start], upper[i, i + 1 : end])
        weight[:, end:] -= errors @ upper[start:end, end:]
    return codes


def _layers(job: Job) -> dict[str, torch.nn.Module]:
    layers = {name: job.module.get_submodule(name) for name in job.layers if job.is_quantized(name)}
    return {name: layer for name, layer in layers.items() if not (isinstance(layer, torch.nn.Conv2d) and layer.groups > 1)}


def _matrix(layer: torch.nn.Module) -> torch.Tensor:
    """The weight as [out, columns]; of a convolution channel by channel, each with all places of the kernel."""
    assert isinstance(layer, LAYERS)
    return layer.weight.detach().double().flatten(1)


def _bias(layer: torch.nn.Module) -> torch.Tensor | None:
    assert isinstance(layer, LAYERS)
    return None if layer.bias is None else layer.bias.detach().double()


def _columns(layer: torch.nn.Module, by_channel: np.ndarray) -> torch.Tensor:
    """A value for each channel, repeated for its columns."""
    assert isinstance(layer, LAYERS)
    return torch.from_numpy(by_channel).double().repeat_interleave(_matrix(layer).shape[1] // len(by_channel))


def _shaped(codes: torch.Tensor, layer: torch.nn.Module) -> np.ndarray:
    assert isinstance(layer, LAYERS)
    return np.asarray(codes.reshape(layer.weight.shape).to(torch.int8).numpy())


def _sizes(layer: torch.nn.Module) -> list[int]:
    """Columns of each H of a layer: all, or blocks of whole channels of at most ``LARGEST``; one more for the bias."""
    assert isinstance(layer, LAYERS)
    channels = layer.weight.shape[1]
    columns = _matrix(layer).shape[1]
    per_channel = columns // channels
    blocks = -(-columns // LARGEST)
    sizes = [len(part) * per_channel for part in np.array_split(np.arange(channels), blocks)]
    sizes[-1] += layer.bias is not None
    return sizes


def _groups(layers: dict[str, torch.nn.Module]) -> Iterator[list[str]]:
    """Names of layers whose H are gathered together."""
    group: list[str] = []
    used = 0
    for name, layer in layers.items():
        needed = sum(8 * size**2 for size in _sizes(layer))
        if group and used + needed > BUDGET:
            yield group
            group, used = [], 0
        group.append(name)
        used += needed
    if group:
        yield group


def _moments(job: Job, layers: dict[str, torch.nn.Module], items: Sequence[Feeds]) -> dict[str, list[torch.Tensor]]:
    """H of every layer's balanced input, in blocks."""
    found = {name: [torch.zeros(size, size, dtype=torch.float64) for size in _sizes(layer)] for name, layer in layers.items()}

    def hook(name: str) -> Callable[..., None]:
        inverse = 1 / _columns(layers[name], job.layers[name].factors)

        def record(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            columns = _patches(layer, inputs[0].detach()).double() * inverse[:, None]
            columns = columns if _bias(layer) is None else torch.cat([columns, torch.ones_like(columns[:1])])
            at = 0
            for h in found[name]:
                part = columns[at : at + len(h)]
                h.addmm_(part, part.T)
                at += len(h)

        return record

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for item in items:
                job.module(**tensors(item))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _patches(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the weight's columns are multiplied with, [columns, places]."""
    if not isinstance(layer, torch.nn.Conv2d):
        return x.reshape(-1, x.shape[-1]).T
    assert layer.padding_mode == "zeros"
    assert not isinstance(layer.padding, str)
    taken = F.unfold(x.float(), layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride)
    return taken.transpose(0, 1).flatten(1)
