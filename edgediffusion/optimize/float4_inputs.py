"""The four-bit floating format of each layer's input, and how far its range is cut: those with the least error of the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from edgediffusion.optimize.clip import CANDIDATES, output_importance, watch_part
from edgediffusion.optimize.float4 import MAGNITUDES, float4_scale
from edgediffusion.optimize.observe import by_channel
from edgediffusion.optimize.observed import Observed
from edgediffusion.optimize.state import LayerState


def choose_input_formats(
    module: torch.nn.Module,
    items: Sequence[Mapping[str, np.ndarray]],
    states: Mapping[str, LayerState],
    found: Mapping[str, Observed],
    forms: Mapping[str, tuple[str, ...]],
    *,
    search: bool,
    progress: Callable[[float], None] = lambda part: None,
) -> dict[str, LayerState]:
    """``states`` of the layers of ``forms`` with the best of these formats for the input, and with ``search`` the best clip of its range.

    Errors count as in ``clip.input_clips``, over a spread part of the items; ``found`` is what the layers saw.
    """
    clips = CANDIDATES if search else (1.0,)
    errors = {name: np.zeros((len(forms[name]), len(clips))) for name in forms}

    def hook(name: str) -> Callable[..., None]:
        state, counts = states[name], output_importance(found[name], states[name])
        factors = torch.from_numpy(state.factors)[:, None]
        largest = max(abs(bound) for bound in replace(state, input_clip=1.0).input_range())

        def record(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = by_channel(layer, inputs[0]) / factors
            for i, form in enumerate(forms[name]):
                for j, part in enumerate(clips):
                    read = read_tensor(x, float(float4_scale(largest * part, form)), form)
                    errors[name][i, j] += float((counts * (x - read).square().mean(1)).sum())

        return record

    watch_part(module, {name: hook(name) for name in forms}, items, progress)
    return {name: _with(states[name], forms[name], clips, errors[name]) for name in forms}


def _with(state: LayerState, forms: tuple[str, ...], clips: Sequence[float], errors: np.ndarray) -> LayerState:
    i, j = np.unravel_index(int(errors.argmin()), errors.shape)
    return replace(state, formats=(state.formats[0], forms[int(i)]), input_clip=clips[int(j)])


def read_tensor(x: torch.Tensor, scale: float, form: str) -> torch.Tensor:
    """What is read back of ``x``; of two values equally near, the lower one, which the few ties of activations do not mind."""
    values = torch.tensor(MAGNITUDES[form])
    codes = torch.bucketize((x / scale).abs().contiguous(), (values[1:] + values[:-1]) / 2)
    return torch.copysign(values[codes], x) * scale
