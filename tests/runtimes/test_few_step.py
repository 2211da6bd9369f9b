"""Samplers of few steps: published numbers, diffusers' schedulers, closed forms, and the settings that checkpoints ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.denoiser import to_x0
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import (
    ddim,
    fastdpm,
    guided_distillation,
    guided_distillation_stochastic,
    lcm,
    resolve,
    restart,
    scm,
    tcd,
)
from edgediffusion.runtimes.schedules import Point, Points, alpha_bars, respaced

from .tiny import STABLE_DIFFUSION

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 8, 8)
FLOW = NoiseSchedule("flow", 1000)
LINEAR = NoiseSchedule("linear", 1000, 1e-4, 0.02, set_alpha_to_one=True)
COSINE = NoiseSchedule("squaredcos_cap_v2", 1000)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def network(x: np.ndarray, timestep: float, at: Point, prediction: str) -> np.ndarray:
    """A smooth fake network with an opinion about x_0 (within -3..3), told as any prediction; float32 as a real one."""
    slope = np.linspace(-1, 1, x.shape[-1], dtype=np.float32)
    x0 = 3 * np.tanh(np.float32(0.3 * at.alpha) * x + np.float32(0.3 * math.cos(timestep / 200)) * slope)
    if prediction == "sample":
        return x0
    noise = (x - np.float32(at.alpha) * x0) / np.float32(at.sigma)
    return {"epsilon": noise, "v": at.alpha * noise - at.sigma * x0, "flow": noise - x0}[prediction].astype(np.float32)


def ours(text: str, schedule: NoiseSchedule, steps: int, prediction: str = "epsilon") -> np.ndarray:
    _, sampler = resolve(text)
    noise, points = TorchNoise(3), sampler.points(schedule, steps)

    def denoise(x: np.ndarray, i: int) -> np.ndarray:
        return to_x0(prediction, x, network(x, points.at[i].timestep, points.at[i], prediction), points.at[i])

    *_, last = sampler.sample(denoise, points.start(noise.normal(SHAPE)), points, noise)
    return np.asarray(last)


def theirs(scheduler: Any, prediction: str, timesteps: dict[str, Any], **options: Any) -> np.ndarray:
    """diffusers' loop with a scheduler of LCM's kind."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(**timesteps)
    x = torch.randn(SHAPE, generator=generator)
    for t in scheduler.timesteps:
        bar = float(scheduler.alphas_cumprod[int(t)])
        output = network(x.numpy(), float(t), Point(math.sqrt(bar), math.sqrt(1 - bar), float(t)), prediction)
        x = scheduler.step(torch.from_numpy(output), t, x, generator=generator, **options).prev_sample
    return np.asarray(x.numpy())


def assert_same_picture(found: np.ndarray, expected: np.ndarray) -> None:
    # Both are float32 loops that round in different places, 6e-8 each; the first division by alpha (0.07 for Stable
    # Diffusion) magnifies that up to 15 times. 1e-5 of the largest value covers it.
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def scheduler(name: str, prediction: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, name)
    return made(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=PREDICTIONS[prediction])


class TestTcd:
    @pytest.mark.parametrize(("gamma", "expected"), [(0.3, [531, 349, 181, 0]), (0.0, [759, 499, 259, 0]), (1.0, [0, 0, 0, 0])])
    def test_golden_arrivals(self, gamma: float, expected: list[int]) -> None:
        points = tcd.points(STABLE_DIFFUSION, 4, tcd.Options(gamma))
        assert [p.timestep for p in points.at] == [999, 759, 499, 259]
        assert [p.timestep for p in points.to] == expected

    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
    @pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_equals_diffusers(self, prediction: str, gamma: float, steps: int) -> None:
        expected = theirs(scheduler("TCDScheduler", prediction), prediction, {"num_inference_steps": steps}, eta=gamma)
        assert_same_picture(ours(f"tcd:gamma={gamma}", STABLE_DIFFUSION, steps, prediction), expected)

    def test_every_arrival_equals_diffusers(self) -> None:
        """0.7 of a timestep is rounded down from a float32 number, where 0.7 x 10 may be 6.9999995."""
        torch = pytest.importorskip("torch")
        for gamma in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9):
            points = tcd.points(STABLE_DIFFUSION, 50, tcd.Options(gamma))
            previous = [torch.tensor(int(p.timestep)) for p in points.at[1:]]
            assert [p.timestep for p in points.to[:-1]] == [int(torch.floor((1 - gamma) * t)) for t in previous]

    def test_noise_brings_the_state_to_the_next_point(self) -> None:
        """With the data known, the state has mean alpha x_0 and variance sigma^2 wherever the network is called."""
        check_marginals(tcd, tcd.points(STABLE_DIFFUSION, 4), 0)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_listed_timesteps_equal_diffusers(name: str) -> None:
    timesteps = [999, 720, 441, 180]
    schedule = respaced(STABLE_DIFFUSION, "timesteps:at=999/720/441/180")
    peer = scheduler({"lcm": "LCMScheduler", "tcd": "TCDScheduler"}[name], "epsilon")
    assert_same_picture(ours(name, schedule, 4), theirs(peer, "epsilon", {"timesteps": timesteps, "num_inference_steps": None}))


class TestScm:
    def test_golden_angles(self) -> None:
        # tau = sin t / (cos t + sin t): 0.78270801 at 1.3, and all noise at pi / 2.
        assert [p.sigma for p in scm.points(FLOW, 2).at] == pytest.approx([1.0, 0.78270801], abs=5e-9)
        assert [p.sigma for p in scm.points(FLOW, 1).at] == pytest.approx([1.0])
        largest = math.atan(160)
        assert largest == pytest.approx(1.5645464, abs=5e-8)
        first = scm.points(COSINE, 4, scm.Options(largest=largest)).at[0]
        assert first.sigma / first.alpha == pytest.approx(160)

    @pytest.mark.parametrize("steps", [1, 2, 4, 20])
    def test_equals_diffusers_with_the_wrapper_of_sana_sprint(self, steps: int) -> None:
        """diffusers' SanaSprintPipeline in the letters of its code: a flow network told as TrigFlow's F, sigma_d = 0.5."""
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        peer, generator = diffusers.SCMScheduler(), torch.Generator().manual_seed(3)
        peer.set_timesteps(steps, max_timesteps=1.5707, intermediate_timesteps=1.3 if steps == 2 else None)
        x = torch.randn(SHAPE, generator=generator) * 0.5
        for t in peer.timesteps[:-1]:
            tau = torch.sin(t) / (torch.cos(t) + torch.sin(t))
            root = torch.sqrt(tau**2 + (1 - tau) ** 2)
            x_in = x / 0.5 * root
            out = network(x_in.numpy(), float(tau) * 1000, Point(1 - float(tau), float(tau), 0.0), "flow")
            f = ((1 - 2 * tau) * x_in + (1 - 2 * tau + 2 * tau**2) * torch.from_numpy(out)) / root
            x, denoised = peer.step(f * 0.5, t, x, generator=generator, return_dict=False)
        assert_same_picture(ours("scm:largest=1.5707", FLOW, steps, "flow"), denoised.numpy() / 0.5)

    @pytest.mark.parametrize(
        ("options", "message"), [("largest=2", r"'largest'.*Got: 2"), ("largest=1,middle=1", r"'middle' is not below")]
    )
    def test_refuses_angles(self, options: str, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            resolve(f"scm:{options}")
        assert resolve("scm:largest=1.5708")[1].points(FLOW, 1).at[0].sigma == pytest.approx(1)

    def test_deterministic_trigflow_is_ddim(self) -> None:
        """x_u = cos(t - u) x_t - sin(t - u) F, an identity of TrigFlow, is DDIM's step at the points of the angles."""
        t, u = 1.2, 0.7
        x, x0 = TorchNoise(1).normal(SHAPE).astype(np.float64), TorchNoise(2).normal(SHAPE).astype(np.float64)
        points = Points((Point(math.cos(t), math.sin(t), 0.0),), (Point(math.cos(u), math.sin(u), 0.0),))
        (found,) = ddim.sample(lambda x, i: x0, x, points, TorchNoise(0))
        f = (math.cos(t) * x - x0) / math.sin(t)
        np.testing.assert_allclose(found, math.cos(t - u) * x - math.sin(t - u) * f, rtol=0, atol=1e-14)  # float64

    def test_a_diffusion_starts_no_higher_than_it_was_trained(self) -> None:
        first = scm.points(STABLE_DIFFUSION, 4).at[0]
        assert first.timestep == pytest.approx(999, abs=1e-4)  # found in a table of float32 logarithms
        assert first.sigma / first.alpha == pytest.approx(14.614641)

    def test_noise_brings_the_state_to_the_next_point(self) -> None:
        check_marginals(scm, scm.points(COSINE, 4), 0)


def check_marginals(sampler: Any, points: Points, first: int) -> None:
    """With a network that always says 0.7, states have mean alpha 0.7 and deviation sigma where the network is called next."""
    shape, value = (1, 200_000), np.float32(0.7)
    at = points.at[0]
    x = at.alpha * value + at.sigma * TorchNoise(5).normal(shape)
    states = list(sampler.sample(lambda x, i: np.full_like(x, value), x, points, TorchNoise(6)))
    for state, to in list(zip(states, points.at[1:], strict=False))[first:]:
        # Of 200,000 numbers the mean is known to 0.0022 and the deviation to 0.0016 times sigma: four standard errors are 0.01.
        assert float(state.mean()) == pytest.approx(0.7 * to.alpha, abs=0.01 * to.sigma + 1e-5)
        assert float(state.std()) == pytest.approx(to.sigma, rel=0.01)


class TestGuidedDistillation:
    @pytest.mark.parametrize(("steps", "expected"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
    def test_knows_t_as_parts_of_the_whole(self, steps: int, expected: list[int]) -> None:
        assert [p.timestep for p in guided_distillation.points(COSINE, steps).at] == expected

    @pytest.mark.parametrize("sampler", [guided_distillation, guided_distillation_stochastic])
    @pytest.mark.parametrize("steps", [1, 2, 3, 8])
    def test_gives_x0_exactly_where_the_network_always_says_it(self, sampler: Any, steps: int) -> None:
        target = TorchNoise(9).normal(SHAPE)
        points = sampler.points(STABLE_DIFFUSION, steps)
        *_, last = sampler.sample(lambda x, i: target, TorchNoise(0).normal(SHAPE), points, TorchNoise(1))
        np.testing.assert_array_equal(last, target)

    def test_the_stochastic_sampler_keeps_the_marginals(self) -> None:
        check_marginals(guided_distillation_stochastic, guided_distillation_stochastic.points(COSINE, 6), 0)

    def test_golden_spread(self) -> None:
        """alpha = cos(pi t / 2), k = 0.25, s = 0.5: sigma_{s|k}^2 = 0.41421356; and its two forms agree."""
        k, s = (Point(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2), t) for t in (0.25, 0.5))
        squared = guided_distillation_stochastic.spread(s, k) ** 2
        assert squared == pytest.approx(0.41421356, abs=5e-9)
        ratio = (s.alpha / s.sigma) ** 2 / (k.alpha / k.sigma) ** 2
        assert squared == pytest.approx((1 - ratio) * s.sigma**2, rel=1e-12)

    def test_one_step_of_the_student_is_two_of_its_teacher(self) -> None:
        """The distillation's target x~ = (z_s - sigma_s / sigma_t z_t) / (alpha_s - sigma_s / sigma_t alpha_t), exactly."""
        t, middle, s = (Point(math.cos(u * math.pi / 2), math.sin(u * math.pi / 2), u) for u in (0.8, 0.65, 0.5))
        z = TorchNoise(1).normal(SHAPE).astype(np.float64)
        teacher = Points((t, middle), (middle, s))
        *_, z_s = ddim.sample(lambda x, i: np.tanh(x), z, teacher, TorchNoise(0))
        r = s.sigma / t.sigma
        target = (z_s - r * z) / (s.alpha - r * t.alpha)
        (found,) = guided_distillation.sample(lambda x, i: target, z, Points((t,), (s,)), TorchNoise(0))
        np.testing.assert_allclose(found, z_s, rtol=0, atol=1e-14)  # float64

    def test_one_call_a_step(self) -> None:
        calls: list[int] = []
        points = guided_distillation_stochastic.points(COSINE, 6)

        def denoise(x: np.ndarray, i: int) -> np.ndarray:
            calls.append(i)
            return x

        list(guided_distillation_stochastic.sample(denoise, TorchNoise(0).normal(SHAPE), points, TorchNoise(1)))
        assert calls == [0, 1, 2, 3, 4, 5]


class TestFastDpm:
    @pytest.mark.parametrize("table", ["linear", "quadratic"])
    def test_step_is_ddim_at_its_timesteps(self, table: str) -> None:
        found = ours(f"fastdpm:table={table}", LINEAR, 10)
        assert_same_picture(found, ours("ddim", respaced(LINEAR, f"fastdpm-{table}"), 10))

    @pytest.mark.parametrize("table", ["linear", "quadratic"])
    @pytest.mark.parametrize("steps", [1, 2, 10, 50])
    @pytest.mark.parametrize("schedule", [LINEAR, STABLE_DIFFUSION], ids=lambda s: s.kind)
    def test_var_ends_in_as_much_noise(self, schedule: NoiseSchedule, steps: int, table: str) -> None:
        bars = alpha_bars(schedule)
        variances = fastdpm.variances(bars, steps, table)
        assert len(variances) == steps
        assert np.all(np.diff(variances) > 0)
        assert float(np.prod(1 - variances)) == pytest.approx(float(bars[-1]), rel=1e-9)
        points = fastdpm.points(schedule, steps, fastdpm.Options("var", table))
        assert points.at[0].timestep == pytest.approx(999, abs=1e-6)
        assert points.at[-1].timestep == pytest.approx(0, abs=1e-9 if steps > 1 else 999)
        assert np.all(np.diff([p.timestep for p in points.at]) < 0)
        assert all(p.alpha**2 + p.sigma**2 == pytest.approx(1) for p in points.at)

    def test_timesteps_in_between_are_those_of_the_gamma_function(self) -> None:
        """The authors' continuation of a product of linear variances: ln ((c)(c - 1)...(c - t)) by log Gamma."""
        delta = (0.02 - 1e-4) / 999
        c = (1 - 1e-4) / delta

        def log_signal(t: float) -> float:
            return (t + 1) * math.log(delta) + math.lgamma(c + 1) - math.lgamma(c - t)

        for point in fastdpm.points(LINEAR, 20, fastdpm.Options("var", "linear")).at[1:-1]:
            low, high = 0.0, 999.0
            while high - low > 1e-6:
                middle = (low + high) / 2
                low, high = (middle, high) if log_signal(middle) > 2 * math.log(point.alpha) else (low, middle)
            assert point.timestep == pytest.approx(low, abs=0.03)

    @pytest.mark.parametrize("text", ["fastdpm:kappa=1", "fastdpm:kappa=0.5,table=linear", "fastdpm:kappa=1,approximation=var"])
    def test_noise_keeps_the_marginals(self, text: str) -> None:
        _, sampler = resolve(text)
        check_marginals(sampler, sampler.points(LINEAR, 6), 0)

    def test_refuses_a_schedule_with_less_noise_than_its_steps_have(self) -> None:
        quiet = replace(LINEAR, beta_start=0.01, beta_end=0.0101)
        with pytest.raises(ArgumentError, match=r"no variances for so many steps.*Got: 1000"):
            fastdpm.points(replace(quiet, beta_end=0.0099), 1000, fastdpm.Options("var"))


class TestRestart:
    imagenet = "4/1/19.35/40.79+4/1/1.09/1.92+4/5/0.59/1.09+4/5/0.30/0.59+6/6/0.06/0.30"

    def test_golden_jump(self) -> None:
        """From sigma 19.35 to 40.79 takes noise of 35.90824."""
        level = {name: Point(1 / math.hypot(1, s), s / math.hypot(1, s), 0.0) for name, s in (("low", 19.35), ("high", 40.79))}
        at = (level["high"], level["low"], level["high"], level["low"], level["low"])
        drawn = TorchNoise(4).normal((1, 8))
        states = list(restart.sample(lambda x, i: 0 * x, np.zeros((1, 8), np.float32), Points.chain(at), TorchNoise(4)))
        np.testing.assert_allclose(states[1] / level["high"].alpha, 35.90824 * drawn, rtol=1e-6)  # float32

    def test_counts_of_the_authors_table(self) -> None:
        """36 steps of Heun are 71 calls; N levels are 2 (N - 1) calls, K times: 6 (1 + 1 + 5 + 5) + 10 x 6 = 132 more."""
        karras = replace(STABLE_DIFFUSION, zero_terminal_snr=True, spacing="karras")
        assert len(restart.points(karras, 36, restart.Options(self.imagenet, 1.003))) == 71 + 132

    def test_without_restarts_it_is_heun(self) -> None:
        quiet = restart.Options("2/1/1e-9/2e-9")  # no level is so low, so it is left out
        points = restart.points(respaced(STABLE_DIFFUSION, "karras"), 10, quiet)
        levels = [p.sigma / p.alpha for p in points.at]
        assert levels == sorted(levels, reverse=True)
        assert len(points) == 19
        _, heun = resolve("heun")
        again = heun.points(respaced(STABLE_DIFFUSION, "karras"), 10)
        assert [p.timestep for p in again.at] == [p.timestep for p in points.at]

        def denoise(x: np.ndarray, i: int) -> np.ndarray:
            return np.tanh(points.at[i].alpha * x)

        x = points.start(TorchNoise(0).normal(SHAPE))
        found, expected = ([*s.sample(denoise, x, points, TorchNoise(1))][-1] for s in (restart, heun))
        assert_same_picture(found, expected)

    def test_a_restart_goes_up_and_comes_down_to_where_it_began(self) -> None:
        points = restart.points(respaced(STABLE_DIFFUSION, "karras"), 12, restart.Options("3/2/0.5/2"))
        levels = [p.sigma / p.alpha for p in points.at]
        rises = [i for i, (a, b) in enumerate(pairwise(levels)) if b > a * 1.0001]
        assert len(rises) == 2
        assert all(levels[i + 1] == pytest.approx(2.0) for i in rises)
        assert levels[rises[0]] == levels[rises[1]] == pytest.approx(0.5, rel=0.4)  # the nearest of twelve
        assert len(points) == 23 + 2 * 4

    def test_keeps_gaussian_data_gaussian(self) -> None:
        """Of data N(0, 0.5^2) and its exact denoiser the deviation must come out, however much noise is added on the way."""
        points = restart.points(respaced(STABLE_DIFFUSION, "karras"), 40, restart.Options("20/2/0.1/2"))

        def denoise(x: np.ndarray, i: int) -> np.ndarray:
            at = points.at[i]
            return x * np.float32(at.alpha * 0.25 / (at.alpha**2 * 0.25 + at.sigma**2))

        *_, last = restart.sample(denoise, points.start(TorchNoise(0).normal((1, 100_000))), points, TorchNoise(1))
        # 100,000 numbers tell a deviation to 0.22 %, and forty Heun steps err by 0.3 %.
        assert float(last.std()) == pytest.approx(0.5, rel=0.015)

    @pytest.mark.parametrize("table", ["", "4/1/2", "1/1/0.1/2", "4/0/0.1/2", "4/1/2/1", "4/1/nan/2", "a/b/c/d"])
    def test_refuses_other_tables(self, table: str) -> None:
        with pytest.raises(ArgumentError, match=r"restart cannot be used.*N/K/t_min/t_max"):
            restart.Options(table)

    def test_refuses_to_restart_above_the_start(self) -> None:
        with pytest.raises(ArgumentError, match=r"above the noise that sampling starts from.*Got: t_max 99"):
            restart.points(STABLE_DIFFUSION, 10, restart.Options("4/1/0.5/99"))


# What published few-step checkpoints ask for, as a sampler, a spacing and a number of steps.
CHECKPOINTS: list[tuple[str, str, str | None, int, list[int]]] = [
    ("SDXL-Turbo, 1 step", "euler-ancestral", "trailing", 1, [999]),
    ("SDXL-Turbo, 4 steps", "euler-ancestral", "trailing", 4, [999, 749, 499, 249]),
    ("SD-Turbo", "euler", "trailing", 2, [999, 499]),
    ("SDXL-Lightning, 2 steps", "euler", "trailing", 2, [999, 499]),
    ("SDXL-Lightning, 4 steps", "euler", "trailing", 4, [999, 749, 499, 249]),
    ("SDXL-Lightning, 8 steps", "euler", "trailing", 8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ("Hyper-SD, 4 steps", "ddim", "trailing", 4, [999, 749, 499, 249]),
    ("Hyper-SD, unified, 1 step", "tcd:gamma=1", None, 1, [999]),
    ("Hyper-SD, unified, 4 steps", "tcd:gamma=0.3", None, 4, [999, 759, 499, 259]),
    ("Hyper-SDXL, 1 step", "lcm", "timesteps:at=800", 1, [800]),
    ("LCM, 4 steps", "lcm", None, 4, [999, 759, 499, 259]),
    ("LCM, 8 steps", "lcm", None, 8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ("any, as listed", "euler", "timesteps:at=999/749/499/187", 4, [999, 749, 499, 187]),
]


@pytest.mark.parametrize(("sampler", "spacing", "steps", "expected"), [c[1:] for c in CHECKPOINTS], ids=[c[0] for c in CHECKPOINTS])
def test_a_checkpoint_gets_the_timesteps_it_was_made_for(sampler: str, spacing: str | None, steps: int, expected: list[int]) -> None:
    points = resolve(sampler)[1].points(respaced(STABLE_DIFFUSION, spacing), steps)
    assert [p.timestep for p in points.at] == expected


def test_one_step_returns_the_estimate_itself() -> None:
    """A checkpoint of one step that predicts x_0 draws what it says, whichever of the one-step samplers asks it."""
    said = TorchNoise(2).normal(SHAPE)
    samplers: list[Callable[..., Any]] = [ddim.sample, guided_distillation.sample, guided_distillation_stochastic.sample, scm.sample]
    points = respaced(replace(STABLE_DIFFUSION, set_alpha_to_one=True), "trailing")
    for sample in samplers:
        (last,) = sample(lambda x, i: said, TorchNoise(1).normal(SHAPE), ddim.points(points, 1), TorchNoise(0))
        np.testing.assert_array_equal(last, said)
    (last,) = lcm.sample(lambda x, i: said, TorchNoise(1).normal(SHAPE), lcm.points(STABLE_DIFFUSION, 1), TorchNoise(0))
    np.testing.assert_allclose(last, said, atol=5e-5)  # c_skip of LCM is 7e-6
