"""The noise of a seed: torch's numbers without torch, and the same numbers every time."""

from __future__ import annotations

import numpy as np
import pytest

from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.runtimes import noise

SEEDS = (0, 42, 2**31, 2**32 - 1, 2**32, 2**40 + 17, 2**63 - 1, -5)
# Below 16 numbers, a multiple of 16, and sizes with a tail: ATen draws each in another way.
SHAPES = ((1, 4, 8, 8), (3,), (1,), (17,), (5, 5), (2, 4, 3, 3), (15,), (16,), (1,), (1, 4, 64, 64), (2,), (33,))


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_torch_over_successive_draws(seed: int) -> None:
    torch = pytest.importorskip("torch")
    generator, ours = torch.Generator().manual_seed(seed), noise.TorchNoise(seed)
    for shape in SHAPES:
        theirs = torch.randn(shape, generator=generator).numpy()
        # torch's vectorized float32 log, sine and cosine are good to a few units in the last place of numbers up to 5.8.
        np.testing.assert_allclose(ours.normal(shape), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_equals_torch_in_float16(seed: int) -> None:
    torch = pytest.importorskip("torch")
    generator, ours = torch.Generator().manual_seed(seed), noise.TorchNoise(seed, "float16")
    for shape in SHAPES:
        theirs = torch.randn(shape, generator=generator, dtype=torch.float16).float().numpy()
        # The float32 numbers before rounding differ by 1e-6, so the rounding may go the other way: one unit of float16.
        np.testing.assert_allclose(ours.normal(shape), theirs, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 4, 8, 8), (2, 3, 5, 7)])
def test_equals_diffusers_randn_tensor(size: tuple[int, ...]) -> None:
    torch_utils = pytest.importorskip("diffusers.utils.torch_utils")
    torch = pytest.importorskip("torch")
    one = torch_utils.randn_tensor(size, generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    np.testing.assert_allclose(noise.source(7, size[0]).normal(size), one.numpy(), rtol=0, atol=1e-6)
    seeds = range(7, 7 + size[0])
    several = torch_utils.randn_tensor(size, generator=[torch.Generator().manual_seed(s) for s in seeds], dtype=torch.float32)
    np.testing.assert_allclose(noise.source(tuple(seeds), size[0]).normal(size), several.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("flavour", noise.FLAVOURS)
class TestEveryFlavour:
    def test_same_seed_same_bits(self, flavour: str) -> None:
        first, second = (noise.source(11, 1, flavour=flavour) for _ in range(2))
        for shape in SHAPES:
            assert first.normal(shape).tobytes() == second.normal(shape).tobytes()

    def test_is_float32_standard_normal(self, flavour: str) -> None:
        values = noise.source(5, 1, flavour=flavour).normal((1, 4, 160, 160))
        assert values.dtype == np.float32
        # Four standard errors at 102,400 numbers: of the mean 1 / sqrt(n), of the variance sqrt(2 / n).
        assert abs(values.mean()) < 4 / np.sqrt(values.size)
        assert abs(values.var() - 1) < 4 * np.sqrt(2 / values.size)

    def test_an_image_of_a_list_of_seeds_does_not_depend_on_the_others(self, flavour: str) -> None:
        batch = noise.source([1, 2, 3], 3, flavour=flavour).normal((3, 4, 5, 5))
        alone = noise.source(2, 1, flavour=flavour).normal((1, 4, 5, 5))
        assert batch[1:2].tobytes() == alone.tobytes()

    def test_halves_are_rounded(self, flavour: str) -> None:
        values = noise.source(1, 1, flavour=flavour, dtype="float16").normal((4, 5))
        np.testing.assert_array_equal(values, values.astype(np.float16).astype(np.float32))


def test_golden_numbers() -> None:
    """Written down once from torch 2.13, so that a machine without torch can tell."""
    expected = [1.9269152879714966, 1.4872840642929077, 0.9007171988487244, -2.1055209636688232]
    np.testing.assert_allclose(noise.TorchNoise(42).normal((1, 4, 8, 8)).ravel()[:4], expected, rtol=0, atol=1e-6)


def test_philox_uses_all_bits_of_the_seed() -> None:
    assert noise.PhiloxNoise(1).normal((16,)).tobytes() != noise.PhiloxNoise(1 + 2**32).normal((16,)).tobytes()


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UnknownName, match="philox, torch"):
        noise.source(0, 1, flavour="dice")
    with pytest.raises(ArgumentError, match="2 seeds for 3 images"):
        noise.source([1, 2], 3)
