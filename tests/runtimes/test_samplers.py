"""Every sampler against diffusers' scheduler, and against the exact path of Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.registry import find, names
from edgediffusion.runtimes.denoiser import to_x0
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import ddim, dpmpp_2m, euler, flow_euler
from edgediffusion.runtimes.schedules import Point, Points

from .tiny import STABLE_DIFFUSION

# diffusers hands torch tensors to numpy.array, of which NumPy 2 complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = (1, 2, 4, 10, 20, 50)
SPACINGS = ("leading", "trailing", "linspace")
FLOW = NoiseSchedule("flow", 1000, shift=3.0)
SHAPE = (2, 4, 8, 8)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


@dataclass(frozen=True)
class Peer:
    """diffusers' scheduler of a sampler, and the predictions that it can do."""

    scheduler: str
    predictions: tuple[str, ...] = ("epsilon", "v", "sample")
    arguments: tuple[tuple[str, Any], ...] = ()


PEERS = {
    "ddim": Peer("DDIMScheduler", arguments=(("clip_sample", False), ("set_alpha_to_one", False))),
    "euler": Peer("EulerDiscreteScheduler"),
    "euler-ancestral": Peer("EulerAncestralDiscreteScheduler", ("epsilon", "v")),
    "dpmpp-2m": Peer("DPMSolverMultistepScheduler"),
    "lcm": Peer("LCMScheduler"),
}


def network(x: np.ndarray, timestep: float, alpha: float, sigma: float, prediction: str) -> np.ndarray:
    """A smooth fake network with an opinion about x_0 (within -3..3), told as any prediction; float32 as a real one."""
    shift = np.linspace(-1, 1, x.shape[-1], dtype=np.float32)
    x0 = 3 * np.tanh(np.float32(0.3 * alpha) * x + np.float32(0.3 * math.cos(timestep / 200)) * shift)
    if prediction == "sample":
        return x0
    noise = (x - np.float32(alpha) * x0) / np.float32(sigma)
    return {"epsilon": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0}[prediction].astype(np.float32)


def ours(name: str, schedule: NoiseSchedule, prediction: str, steps: int) -> np.ndarray:
    sampler, noise = find("runtimes.samplers", name), TorchNoise(3)
    points = sampler.points(schedule, steps)

    def denoise(x: np.ndarray, i: int) -> np.ndarray:
        at = points.at[i]
        return to_x0(prediction, x, network(x, at.timestep, at.alpha, at.sigma, prediction), at)

    x = points.start(noise.normal(SHAPE))
    *_, last = sampler.sample(denoise, x, points, noise)
    assert last.dtype == np.float32
    return np.asarray(last)


def theirs(scheduler: Any, prediction: str, steps: int, point: Callable[[Any], tuple[float, float]]) -> np.ndarray:
    """diffusers' pipeline loop. ``point`` gives alpha and sigma, which the fake network would know from its training."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    for timestep in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        alpha, sigma = point(timestep)
        output = torch.from_numpy(network(fed.numpy(), float(timestep), alpha, sigma, prediction))
        x = scheduler.step(output, timestep, x, **({"generator": generator} if takes_generator else {})).prev_sample
    return np.asarray(x.numpy())


def table(scheduler: Any) -> Callable[[Any], tuple[float, float]]:
    """Signal and noise at a timestep of a variance-preserving schedule, interpolated in sigma / alpha as Euler has it."""
    bars = scheduler.alphas_cumprod.numpy().astype(np.float64)
    ratios = np.sqrt((1 - bars) / bars)

    def point(timestep: Any) -> tuple[float, float]:
        ratio = float(np.interp(float(timestep), np.arange(len(ratios)), ratios))
        return 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)

    return point


def assert_same_picture(found: np.ndarray, expected: np.ndarray) -> None:
    # Both are float32 loops of up to 50 steps that round in different places, 6e-8 each; the first division by alpha
    # (0.07 for Stable Diffusion) magnifies that up to 15 times. 1e-5 of the largest value covers it.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "prediction"), [(n, p) for n, peer in PEERS.items() for p in peer.predictions])
def test_equals_diffusers(name: str, prediction: str, spacing: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer, schedule = PEERS[name], replace(STABLE_DIFFUSION, spacing=spacing)
    scheduler = getattr(diffusers, peer.scheduler)(
        num_train_timesteps=schedule.train_steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.kind,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
        steps_offset=schedule.steps_offset,
        **dict(peer.arguments),
    )
    assert_same_picture(ours(name, schedule, prediction, steps), theirs(scheduler, prediction, steps, table(scheduler)))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_equals_diffusers(shift: float, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    expected = theirs(scheduler, "flow", steps, lambda t: (1 - float(t) / 1000, float(t) / 1000))
    assert_same_picture(ours("flow-euler", replace(FLOW, shift=shift), "flow", steps), expected)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmpp_2m_on_a_flow_equals_diffusers(shift: float, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")

    def point(timestep: Any) -> tuple[float, float]:
        sigma = float(scheduler.sigmas[scheduler.step_index or 0])
        return 1 - sigma, sigma

    assert_same_picture(ours("dpmpp-2m", replace(FLOW, shift=shift), "flow", steps), theirs(scheduler, "flow", steps, point))


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp-2m"])
def test_zero_terminal_snr_equals_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = replace(STABLE_DIFFUSION, spacing="trailing", zero_terminal_snr=True, set_alpha_to_one=False)
    peer = PEERS[name]
    scheduler = getattr(diffusers, peer.scheduler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        **dict(peer.arguments),
    )

    def point(timestep: Any) -> tuple[float, float]:
        bar = float(scheduler.alphas_cumprod[int(timestep)])
        return math.sqrt(bar), math.sqrt(1 - bar)

    expected = theirs(scheduler, "v", 10, point)
    # diffusers' Euler state is up to 4096 times larger there and float32, so its last digits are worth 4096 * 6e-8.
    np.testing.assert_allclose(ours(name, schedule, "v", 10), expected, rtol=0, atol=3e-4 * np.abs(expected).max())


# Gaussian data N(0, s^2) has a closed-form denoiser and path, so the order of a sampler shows without any network.

S = 0.5


def gaussian_path_error(sampler: Any, steps: int, *, flow: bool = False) -> float:
    """Error at the end of a path from t = 0.9 to 0.1 in ``steps`` equal steps of lambda (of sigma for a flow), from x = 1."""
    if flow:
        points = [Point(1 - sigma, sigma, 0.0) for sigma in np.linspace(0.9, 0.1, steps + 1).tolist()]
    else:
        ends = [math.log(math.cos(t * math.pi / 2) / math.sin(t * math.pi / 2)) for t in (0.9, 0.1)]
        powers = [1 / (1 + math.exp(-2 * h)) for h in np.linspace(*ends, steps + 1).tolist()]
        points = [Point(math.sqrt(p), math.sqrt(1 - p), 0.0) for p in powers]
    # One more step, to the end where it is: samplers treat the last step in a way of their own.
    trajectory = Points((*points[:-1], points[-1]), (*points[1:], points[-1]))

    def denoise(x: np.ndarray, i: int) -> np.ndarray:
        at = trajectory.at[i]
        return at.alpha * S**2 * x / (at.alpha**2 * S**2 + at.sigma**2)

    states = list(sampler.sample(denoise, np.ones(1), trajectory, TorchNoise(0)))
    start, end = ((p.alpha**2 * S**2 + p.sigma**2) ** 0.5 for p in (points[0], points[-1]))
    return abs(float(states[steps - 1][0]) - end / start)


@pytest.mark.parametrize("sampler", [ddim, euler], ids=["ddim", "euler"])
def test_golden_errors_of_first_order(sampler: Any) -> None:
    found = [gaussian_path_error(sampler, n) for n in (10, 20, 40, 80, 160)]
    assert found == pytest.approx([4.176e-2, 2.130e-2, 1.076e-2, 5.407e-3, 2.710e-3], rel=5e-4)  # published to four digits


def test_golden_errors_of_dpmpp_2m() -> None:
    found = [gaussian_path_error(dpmpp_2m, n) for n in (10, 20, 40, 80, 160)]
    assert found == pytest.approx([3.932e-4, 3.573e-4, 1.126e-4, 3.051e-5, 7.894e-6], rel=5e-4)  # published to four digits


@pytest.mark.parametrize(("sampler", "flow"), [(ddim, False), (euler, False), (dpmpp_2m, False), (flow_euler, True), (dpmpp_2m, True)])
def test_order_of_convergence(sampler: Any, flow: bool) -> None:
    coarse, fine = (gaussian_path_error(sampler, n, flow=flow) for n in (160, 320))
    # Halving the step divides the error by 2^order; the next term of the error is 1/160 of it for order 1, more for 2.
    assert math.log2(coarse / fine) == pytest.approx(sampler.ORDER, abs=0.05)


# Conformance: what holds for every file of the folder, the next one included.


@pytest.mark.parametrize("name", names("runtimes.samplers"))
class TestEverySampler:
    def trajectory(self, name: str, steps: int) -> tuple[Any, Points]:
        sampler = find("runtimes.samplers", name)
        try:
            return sampler, sampler.points(STABLE_DIFFUSION, steps)
        except Exception:
            return sampler, sampler.points(FLOW, steps)

    def test_has_a_peer_or_a_test_of_its_own(self, name: str) -> None:
        assert name in PEERS or name == "flow-euler", "Compare the new sampler with another implementation."

    def test_calls_the_network_once_a_step_in_order(self, name: str) -> None:
        sampler, points = self.trajectory(name, 7)
        calls = []

        def denoise(x: np.ndarray, i: int) -> np.ndarray:
            calls.append(i)
            return x * np.float32(0.1)

        states = list(sampler.sample(denoise, TorchNoise(0).normal(SHAPE), points, TorchNoise(1)))
        assert calls == list(range(7))
        assert [state.shape for state in states] == [SHAPE] * 7

    def test_finds_the_data_when_the_network_knows_it(self, name: str) -> None:
        sampler, points = self.trajectory(name, 5)
        target = TorchNoise(9).normal(SHAPE)
        *_, last = sampler.sample(lambda x, i: target, points.start(TorchNoise(0).normal(SHAPE)), points, TorchNoise(1))
        # DDIM may end at the first training timestep, at alpha_bar 0.99915, rather than at the data (set_alpha_to_one).
        left = max(points.to[-1].sigma, 1 - points.to[-1].alpha)
        # Otherwise: float32 rounding over five steps, and LCM's c_skip of 7e-6 times the state.
        np.testing.assert_allclose(last, target, rtol=0, atol=6 * left + 5e-5)

    def test_leaves_its_input_alone_and_keeps_no_state(self, name: str) -> None:
        sampler, points = self.trajectory(name, 4)
        x = TorchNoise(0).normal(SHAPE)
        before = x.copy()
        runs = [[s.tobytes() for s in sampler.sample(lambda x, i: np.tanh(x), x, points, TorchNoise(1))] for _ in range(2)]
        assert runs[0] == runs[1]
        assert x.tobytes() == before.tobytes()

    def test_stays_in_float32(self, name: str) -> None:
        sampler, points = self.trajectory(name, 3)
        states = sampler.sample(lambda x, i: x * np.float32(0.5), TorchNoise(0).normal(SHAPE), points, TorchNoise(1))
        assert {state.dtype for state in states} == {np.dtype(np.float32)}
