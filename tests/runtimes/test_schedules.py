"""Schedules against published numbers and against diffusers' tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError, BundleError, UnknownName
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.samplers import ddim, dpmpp_2m, euler, flow_euler, lcm

from .tiny import STABLE_DIFFUSION

KINDS = {
    "linear": (0.0001, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "squaredcos_cap_v2": (0.0, 0.0),
}


def test_alpha_bar_of_stable_diffusion() -> None:
    bars = schedules.alpha_bars(STABLE_DIFFUSION)
    # The published numbers are of float64; diffusers' float32 factors round up to 3e-8 each, hundreds of times.
    np.testing.assert_allclose(bars[[0, 249, 499, 749, 999]], [0.99915, 0.67543241, 0.27766965, 0.05662349, 0.00466010], atol=1e-6)
    assert np.sqrt((1 - bars[-1]) / bars[-1]) == pytest.approx(14.614641, abs=1e-5)  # float32 alpha_bar: 6e-8 of 14.6


def test_alpha_bar_of_the_cosine_schedule() -> None:
    bars = schedules.alpha_bars(NoiseSchedule("squaredcos_cap_v2", 1000))
    np.testing.assert_allclose(bars[[0, 499]], [0.99995872, 0.49384359], atol=1e-7)  # published to eight digits; table in float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_alpha_bar_equals_diffusers(kind: str, zero_terminal_snr: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    start, end = KINDS[kind]
    theirs = diffusers.DDIMScheduler(1000, start, end, kind, rescale_betas_zero_snr=zero_terminal_snr).alphas_cumprod.numpy()
    ours = schedules.alpha_bars(NoiseSchedule(kind, 1000, start, end, zero_terminal_snr=zero_terminal_snr))
    # One unit in the last place of float32. Rescaling subtracts square roots, and torch's vectorized ones are not all
    # correctly rounded (18 % differ in the last bit here): near the end the difference of two of them shows that.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5 if zero_terminal_snr else 1.2e-7, atol=0)
    assert (ours[-1] == 0) == zero_terminal_snr


def test_spacings() -> None:
    trailing = replace(STABLE_DIFFUSION, spacing="trailing")
    assert {n: schedules.spaced(trailing, n).tolist() for n in (1, 2, 4, 8)} == {
        1: [999],
        2: [999, 499],
        4: [999, 749, 499, 249],
        8: [999, 874, 749, 624, 499, 374, 249, 124],
    }
    assert schedules.spaced(STABLE_DIFFUSION, 4).tolist() == [751, 501, 251, 1]
    assert schedules.spaced(replace(STABLE_DIFFUSION, spacing="linspace"), 4).tolist() == [999, 666, 333, 0]


def test_lcm_timesteps() -> None:
    expected = {
        1: [999],
        2: [999, 499],
        3: [999, 679, 339],
        4: [999, 759, 499, 259],
        6: [999, 839, 679, 499, 339, 179],
        8: [999, 879, 759, 639, 499, 379, 259, 139],
    }
    assert {n: [p.timestep for p in lcm.points(STABLE_DIFFUSION, n).at] for n in expected} == expected


def test_lcm_boundary() -> None:
    assert lcm.boundary(0) == (1, 0)
    assert lcm.boundary(1) == pytest.approx((0.00249377, 0.99875234), abs=5e-9)  # published to eight digits
    assert lcm.boundary(19) == pytest.approx((7e-6, 1), abs=1e-5)


@pytest.mark.parametrize("sampler", [ddim, euler, dpmpp_2m, lcm], ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_points_preserve_variance_and_end_clean(sampler: object) -> None:
    points = sampler.points(replace(STABLE_DIFFUSION, set_alpha_to_one=True, spacing="trailing"), 10)  # type: ignore[attr-defined]
    for point in (*points.at, *points.to):
        assert point.alpha**2 + point.sigma**2 == pytest.approx(1, abs=1e-12)  # float64 arithmetic
    assert points.to[:-1] == points.at[1:]
    assert (points.to[-1].alpha, points.to[-1].sigma) == (1, 0)


@pytest.mark.parametrize("sampler", [flow_euler, dpmpp_2m], ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_points_of_a_flow_mix_data_and_noise(sampler: object) -> None:
    points = sampler.points(NoiseSchedule("flow", 1000, shift=3.0), 7)  # type: ignore[attr-defined]
    assert all(p.alpha + p.sigma == pytest.approx(1, abs=1e-12) for p in points.at)  # float64 arithmetic
    assert all(a.sigma > b.sigma for a, b in points)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_refuses_numbers_of_steps(steps: int) -> None:
    for sampler in (ddim, euler, dpmpp_2m):
        with pytest.raises(ArgumentError, match="1 to 1000"):
            sampler.points(STABLE_DIFFUSION, steps)
    with pytest.raises(ArgumentError, match="1 to 50"):
        lcm.points(STABLE_DIFFUSION, steps)


def test_refuses_steps_beyond_the_training_range() -> None:
    with pytest.raises(ArgumentError, match="Take fewer steps"):
        ddim.points(STABLE_DIFFUSION, 1000)  # the offset of 1 would ask for timestep 1000


def test_refuses_schedules_it_does_not_know() -> None:
    with pytest.raises(BundleError, match=r"Got: spiral.*squaredcos"):
        ddim.points(NoiseSchedule("spiral", 1000), 3)
    for sampler in (ddim, dpmpp_2m):
        with pytest.raises(UnknownName, match=r"No spacing is called 'odd'.*trailing"):
            sampler.points(replace(STABLE_DIFFUSION, spacing="odd"), 3)


def test_refuses_a_sampler_for_the_other_kind_of_schedule() -> None:
    with pytest.raises(ArgumentError, match="deis, dpmpp-2m, .*flow-euler"):
        ddim.points(NoiseSchedule("flow", 1000), 3)
    with pytest.raises(ArgumentError, match="ddim, ddpm, deis, dpm2, .*euler"):
        flow_euler.points(STABLE_DIFFUSION, 3)
