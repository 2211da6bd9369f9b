"""Schedules against published numbers and against diffusers' tables."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError, BundleError, UnknownName
from edgediffusion.registry import find, names
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.request import Request, plan
from edgediffusion.runtimes.samplers import ddim, dpmpp_2m, euler, flow_euler, lcm
from edgediffusion.runtimes.spacings import EVEN, beta, exponential, karras

from .tiny import SAMPLING, STABLE_DIFFUSION

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


# Ramps


def test_beta_quantiles_are_those_of_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    p = np.linspace(0, 1, 41)
    for a, b in ((0.6, 0.6), (0.1, 3.0), (2.0, 0.5), (1.0, 1.0), (10.0, 10.0)):
        found = [beta.quantile(q, a, b) for q in p.tolist()]
        # Both invert a function known to 1e-15 or so; where it is flat (a = 0.1) that is worth more in x.
        np.testing.assert_allclose(found, scipy_stats.beta.ppf(p, a, b), rtol=1e-9, atol=1e-12)


def test_beta_quantiles_without_scipy() -> None:
    assert [beta.quantile(p, 1.0, 1.0) for p in (0.0, 0.25, 0.9, 1.0)] == pytest.approx([0.0, 0.25, 0.9, 1.0], abs=1e-15)  # uniform
    assert beta.quantile(0.25, 0.5, 0.5) == pytest.approx(math.sin(math.pi / 8) ** 2, abs=1e-14)  # the arcsine law
    assert beta.quantile(0.5, 0.6, 0.6) == pytest.approx(0.5, abs=1e-14)


def test_ramps() -> None:
    # 80 down to 0.002 with rho = 7: the noise levels of Karras et al. 2022, equation 5, at the ends and in the middle.
    levels = karras.ramp(80.0, 0.002, 3)
    assert levels.tolist() == pytest.approx([80.0, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, 0.002], rel=1e-12)
    assert exponential.ramp(100.0, 0.01, 5).tolist() == pytest.approx([100.0, 10.0, 1.0, 0.1, 0.01], rel=1e-12)
    dense = beta.ramp(1.0, 0.0, 11)
    assert dense[0] - dense[1] < dense[4] - dense[5]
    assert dense[4] - dense[5] == pytest.approx(dense[5] - dense[6])


@pytest.mark.parametrize("name", names("runtimes.spacings"))
def test_every_spacing_gives_levels_that_fall(name: str) -> None:
    module = find("runtimes.spacings", name)
    assert hasattr(module, "timesteps") != hasattr(module, "ramp")
    if name in ("dp", "timesteps", "sigmas"):
        pytest.skip("takes a table of its own: tests/runtimes/test_spacings_tables.py")
    for with_end in (False, True):
        ratios, timesteps = schedules.levels(replace(STABLE_DIFFUSION, spacing=name), 10, with_end=with_end)
        assert ratios.shape == timesteps.shape == (10,)
        assert (np.diff(ratios) < 0).all()
        assert (np.diff(timesteps) < 0).all()
        assert 0 <= timesteps[-1] < timesteps[0] <= 999


def test_ramps_run_between_the_levels_of_their_ends() -> None:
    for spacing in EVEN:
        even = schedules.levels(replace(STABLE_DIFFUSION, spacing=spacing), 10)[0]
        ramp = schedules.levels(replace(STABLE_DIFFUSION, spacing=f"karras:ends={spacing}"), 10)[0]
        assert (ramp[0], ramp[-1]) == pytest.approx((even[0], even[-1]), rel=1e-12)
    whole = schedules.levels(replace(STABLE_DIFFUSION, spacing="karras"), 1, with_end=True)[0]
    assert whole[0] == pytest.approx(14.614641, abs=1e-5)  # a multistep solver starts from all the noise, even in one step


# What a request makes of a spacing


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ("karas", "No spacing is called 'karas'.*'karras'"),
        ("leading:rho=2", "'leading' has no option 'rho'.*none"),
        ("karras:rho=0", "'rho'.*Got: 0.*Allowed: 0.1 to 100"),
        ("beta:ends=beta", "'ends'.*Got: beta.*leading, trailing, linspace"),
    ],
)
def test_refuses_spacings(spacing: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        schedules.respaced(STABLE_DIFFUSION, spacing)


def test_a_flow_takes_ramps_alone() -> None:
    flow = NoiseSchedule("flow", 1000, shift=3.0)
    with pytest.raises(ArgumentError, match="no training timesteps.*beta, .*karras"):
        schedules.respaced(flow, "trailing")
    plain, ramp = (flow_euler.points(schedules.respaced(flow, spacing), 5).at for spacing in (None, "karras"))
    assert (ramp[0].sigma, ramp[-1].sigma) == pytest.approx((plain[0].sigma, plain[-1].sigma), rel=1e-12)
    assert ramp[2].sigma < plain[2].sigma


def test_a_request_overrides_the_spacing_and_hears_when_that_does_nothing() -> None:
    options = {"num_inference_steps": 4, "spacing": "trailing"}
    settled = plan(Request("a", sampler="ddim", **options), SAMPLING)
    assert [point.timestep for point in settled.points.at] == [999, 749, 499, 249]
    assert (settled.steps, settled.spacing, settled.warnings) == (4, "trailing", ())
    (warning,) = plan(Request("a", sampler="lcm", **options), SAMPLING).warnings
    assert warning.startswith("spacing trailing has no effect")
    assert plan(Request("a", sampler="heun", num_inference_steps=4), SAMPLING).steps == 4
    assert len(plan(Request("a", sampler="heun", num_inference_steps=4), SAMPLING).points) == 7
