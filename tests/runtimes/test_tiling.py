"""Tiles against diffusers' own: the same tiny autoencoder, whole and in tiles."""

from __future__ import annotations

import numpy as np
import pytest

from edgediffusion.runtimes.tiling import tiled


def up(tile: np.ndarray) -> np.ndarray:
    """A network without surroundings: each number becomes 2 x 2."""
    return tile.repeat(2, axis=2).repeat(2, axis=3)


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (9, 8), (8, 17), (33, 20)])
def test_tiles_of_a_network_that_looks_at_one_pixel_make_the_whole_picture(size: tuple[int, int]) -> None:
    array = ramp(1, 3, *size)
    np.testing.assert_allclose(tiled(up, array, 8, 16), up(array), rtol=2e-7)  # w a + (1 - w) a, rounded


def test_a_picture_of_one_tile_is_run_as_it_is() -> None:
    seen = []
    array = ramp(1, 1, 8, 8)
    tiled(lambda tile: (seen.append(tile), tile)[1], array, 8, 8)
    assert seen[0] is array


def test_tiles_are_no_larger_than_asked_for_and_cover_the_picture() -> None:
    shapes = []
    tiled(lambda tile: (shapes.append(tile.shape[2:]), tile)[1], ramp(1, 1, 20, 16), 8, 8)
    assert max(shapes) == (8, 8)
    assert len(shapes) == 4 * 3  # every 6 numbers


def test_goes_over_line_by_line_from_one_tile_to_the_next() -> None:
    """Tiles that disagree: the first says 0, the second 1. A quarter of a tile of 8 has two lines: 0 and 1/2 of the way."""
    values = iter((0.0, 1.0))
    line = tiled(lambda tile: np.full(tile.shape, next(values), np.float32), np.zeros((1, 1, 1, 12), np.float32), 8, 8)
    assert line.ravel().tolist() == [0, 0, 0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1]


def test_a_buffer_that_is_used_again_does_no_harm() -> None:
    buffers: dict[tuple[int, ...], np.ndarray] = {}

    def run(tile: np.ndarray) -> np.ndarray:
        buffer = buffers.setdefault(tile.shape, np.empty_like(tile))
        buffer[...] = tile
        return buffer

    array = ramp(1, 2, 20, 20)
    np.testing.assert_allclose(tiled(run, array, 8, 8), array, rtol=2e-7)


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (40, 28)])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_equals_diffusers(direction: str, size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    decode = direction == "decode"
    array = np.random.default_rng(0).standard_normal((1, 4, size[0] // 2, size[1] // 2) if decode else (1, 3, *size)).astype(np.float32)

    def call(array: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            return np.asarray(vae.decode(tensor).sample if decode else vae.encode(tensor).latent_dist.parameters)

    ours = tiled(call, array, 8 if decode else 16, 16 if decode else 8)
    vae.enable_tiling()
    theirs = call(array)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)  # the same float32 network on the same tiles
