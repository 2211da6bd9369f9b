"""Large pictures through a network in overlapping tiles, so that its memory does not grow with the picture.

The tiles, their overlap and the blending are those of diffusers' AutoencoderKL (``tiled_encode``, ``tiled_decode``). Every tile
is normalized with its own statistics, so the result is close to that of the whole picture and not equal to it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

OVERLAP = 0.25


def tiled(run: Callable[[np.ndarray], np.ndarray], array: np.ndarray, tile: int, tile_out: int) -> np.ndarray:
    """``run`` over an array [n, c, h, w] in tiles of ``tile`` x ``tile``, which become ``tile_out`` x ``tile_out``.

    Tiles begin every 3/4 of ``tile``; at the lower and right edge they are smaller. An array that fits into one tile is run
    as it is. ``run`` may return its buffer: what is kept of it is copied.
    """
    height, width = array.shape[2:]
    if height <= tile and width <= tile:
        return run(array)
    stride, blend = int(tile * (1 - OVERLAP)), int(tile_out * OVERLAP)
    keep = tile_out - blend
    above: list[np.ndarray] = []
    rows = []
    for top in range(0, height, stride):
        row = [run(array[:, :, top : top + tile, left : left + tile]).copy() for left in range(0, width, stride)]
        for j, part in enumerate(row):
            if above:
                _blend(above[j], part, blend, axis=2)
            if j > 0:
                _blend(row[j - 1], part, blend, axis=3)
        rows.append(np.concatenate([part[:, :, :keep, :keep] for part in row], axis=3))
        above = row
    return np.concatenate(rows, axis=2)


def _blend(before: np.ndarray, after: np.ndarray, extent: int, *, axis: int) -> None:
    """The first ``extent`` lines of ``after`` go over, line by line, from the last ones of ``before``; in place."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    weights = np.arange(extent, dtype=np.float32) / np.float32(max(extent, 1))
    weights = weights.reshape((-1, 1) if axis == 2 else (1, -1))
    end = before[:, :, before.shape[2] - extent :] if axis == 2 else before[:, :, :, before.shape[3] - extent :]
    begin = after[:, :, :extent] if axis == 2 else after[:, :, :, :extent]
    begin[...] = end * (1 - weights) + begin * weights
