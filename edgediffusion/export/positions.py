"""Places of tokens, computed in float32 inside a graph.

diffusers makes the angles of positional embeddings in float64, which engines other than ONNX Runtime lack kernels for. Frequencies
are constants and stay exact; an angle, a small integer times a frequency, is rounded once to float32: 4e-6 for the 64th token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch


def in_float32(embedding: Any) -> None:
    """Let a FluxPosEmbed compute in float32, in place; what it takes and returns stays as it is."""
    embedding.forward = partial(_rotary, embedding)


def _rotary(embedding: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [tokens, axes] to cosines and sines [tokens, width], each twice in a row: Su et al. 2021 (2104.09864), section 3.4.2."""
    angles = [ids[:, i : i + 1].float() * _frequencies(embedding.theta, width) for i, width in enumerate(embedding.axes_dim)]
    doubled = torch.stack([torch.cat(angles, dim=1)] * 2, dim=-1).flatten(1)
    return doubled.cos(), doubled.sin()


def _frequencies(theta: float, width: int) -> torch.Tensor:
    """float32 [1, width / 2]: theta^(-2 i / width)."""
    return torch.tensor((1.0 / theta ** (np.arange(0, width, 2) / width)).astype(np.float32))[None]


def any_size(embedding: Any) -> None:
    """Let a PatchEmbed make its table of places for the size at hand, in float32 and in place, its own size being one of many.

    diffusers interpolates by dividing places by how many times larger a picture is than it was trained for: see its
    ``get_2d_sincos_pos_embed``. An embedding without a table, or one that is cropped, stays as it is.
    """
    if embedding.pos_embed is not None and not embedding.pos_embed_max_size:
        embedding.forward = partial(_patches, embedding)


def _patches(embedding: Any, latent: torch.Tensor) -> torch.Tensor:
    """[b, c, h, w] to tokens with their places, [b, h * w / patch^2, width]."""
    grid: torch.Tensor = embedding.proj(latent)
    rows, columns = grid.shape[-2:]
    tokens = grid.flatten(2).transpose(1, 2)
    width, base = grid.shape[1], embedding.base_size / embedding.interpolation_scale
    across, down = (_waves(size, base, width // 2) for size in (columns, rows))
    places = [across[None, :].expand(rows, columns, width // 2), down[:, None].expand(rows, columns, width // 2)]
    return (tokens + torch.cat(places, dim=-1).reshape(1, rows * columns, width)).to(tokens.dtype)


def _waves(size: int, base: float, width: int) -> torch.Tensor:
    """[size, width]: sines and then cosines of places from 0 to ``base``, as Vaswani et al. 2017 (1706.03762) but for that order."""
    angles = torch.arange(size, dtype=torch.float32)[:, None] * base / size * _frequencies(10000.0, width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
