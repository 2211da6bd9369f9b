"""Hadamard rotation of linear layers' inputs (HQ-DiT, Liu and Zhang 2024, 2405.19751): outliers are shared out among channels.

This is the torch side of ``passes/rotate.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from edgediffusion.optimize.passes.rotate import hadamard, rotated_weight


class Rotation(torch.nn.Module):
    """x H, for x [..., channels]."""

    matrix: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        h = hadamard(channels)
        assert h is not None
        self.register_buffer("matrix", torch.from_numpy(h))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix


def rotate_module(module: torch.nn.Module, names: Iterable[str], prefix: str = "") -> None:
    """Let linear layers read rotated inputs: ``name`` becomes the rotation ``name.0`` and the layer ``name.1``."""
    for name in names:
        parent, _, last = f"{prefix}{name}".rpartition(".")
        owner = module.get_submodule(parent)
        linear = owner.get_submodule(last)
        assert isinstance(linear, torch.nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(rotated_weight(linear.weight.detach().float().numpy())))
        setattr(owner, last, torch.nn.Sequential(Rotation(linear.in_features), linear))
