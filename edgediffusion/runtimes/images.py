"""Pixels to Pillow's images."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgediffusion.registry import require


def to_pixels(decoded: np.ndarray) -> np.ndarray:
    """A decoder's [n, c, h, w] in -1..1 to float32 [n, h, w, c] in 0..1."""
    pixels = (decoded.astype(np.float32) / 2 + 0.5).clip(0, 1)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def to_images(pixels: np.ndarray) -> list[Any]:
    """Pillow images of [n, h, w, c] in 0..1: mode L for one channel, RGB for three."""
    image = require("PIL.Image", extra="cpu", purpose="Making an image")
    levels = (pixels * 255).round().astype(np.uint8)
    return [image.fromarray(level[:, :, 0] if level.shape[2] == 1 else level) for level in levels]
