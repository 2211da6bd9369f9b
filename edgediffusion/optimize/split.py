"""The torch side of split convolutions: what ``passes/split_concat.py`` does to a graph, done to a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class SplitConvolution(torch.nn.ModuleList):
    """A convolution as the sum of one for each part of its input's channels; the bias is the first's."""

    def __init__(self, convolution: torch.nn.Conv2d, sizes: tuple[int, ...]):
        super().__init__()
        self.sizes = sizes
        for at, weight in enumerate(torch.split(convolution.weight.detach(), list(sizes), 1)):
            part = torch.nn.Conv2d(
                weight.shape[1],
                weight.shape[0],
                tuple(convolution.kernel_size),  # type: ignore[arg-type]
                tuple(convolution.stride),  # type: ignore[arg-type]
                convolution.padding,  # type: ignore[arg-type]
                tuple(convolution.dilation),  # type: ignore[arg-type]
                bias=at == 0 and convolution.bias is not None,
                padding_mode=convolution.padding_mode,
            )
            with torch.no_grad():
                part.weight.copy_(weight)
                if part.bias is not None and convolution.bias is not None:
                    part.bias.copy_(convolution.bias)
            self.append(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part(piece) for part, piece in zip(self, torch.split(x, list(self.sizes), 1), strict=True)]).sum(0)


def split_module(module: torch.nn.Module, sizes: Mapping[str, tuple[int, ...]], prefix: str = "") -> None:
    """Put split convolutions into ``module`` for those that ``sizes`` names, by their paths without ``prefix``."""
    for name, parts in sizes.items():
        parent, _, last = f"{prefix}{name}".rpartition(".")
        owner = module.get_submodule(parent)
        convolution = owner.get_submodule(last)
        assert isinstance(convolution, torch.nn.Conv2d)
        setattr(owner, last, SplitConvolution(convolution, parts))
