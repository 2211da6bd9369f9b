"""Every sampler: its shape, and its order of convergence on Gaussian data. Against diffusers: test_parity.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.registry import find, names
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import _two_calls, resolve
from edgediffusion.runtimes.schedules import CLEAN, Point, Points

from .peers import PEERS
from .tiny import STABLE_DIFFUSION

SHAPE = (2, 4, 8, 8)
FLOW = NoiseSchedule("flow", 1000, shift=3.0)
OWN_TESTS = Path(__file__).parent

# Gaussian data N(0, s^2) has a closed-form denoiser and path, so the order of a sampler shows without any network.

S = 0.5


def nodes_of(steps: int, *, flow: bool) -> list[Point]:
    """From t = 0.9 to 0.1 of a cosine path in ``steps`` equal steps of lambda, or of sigma for a flow."""
    if flow:
        return [Point(1 - sigma, sigma, 0.0) for sigma in np.linspace(0.9, 0.1, steps + 1).tolist()]
    ends = [math.log(math.cos(t * math.pi / 2) / math.sin(t * math.pi / 2)) for t in (0.9, 0.1)]
    powers = [1 / (1 + math.exp(-2 * h)) for h in np.linspace(*ends, steps + 1).tolist()]
    return [Point(math.sqrt(p), math.sqrt(1 - p), 0.0) for p in powers]


def calls_of(name: str, nodes: list[Point]) -> Points:
    """The points of a sampler that goes through the nodes and then on to the clean picture, in one more step."""
    if name in ("heun", "flow-heun"):
        return _two_calls.ends(nodes)
    if name == "dpm2":
        between = [
            Point(1 / math.hypot(1, r), r / math.hypot(1, r), 0.0) for r in (math.sqrt(a.ratio * b.ratio) for a, b in pairwise(nodes))
        ]
        return Points.chain((nodes[0], *(p for pair in zip(between, nodes[1:], strict=True) for p in pair)))
    if name == "pndm":
        at = (*nodes[:2], *nodes[1:])
        return Points(at, (nodes[1], nodes[1], *nodes[2:], CLEAN))
    return Points.chain(tuple(nodes))


def gaussian_path_error(text: str, steps: int, *, flow: bool = False) -> float:
    """Error where the last step but one ends, from x = 1 at the beginning: the last step, to no noise, hides the order."""
    name, sampler = resolve(text)
    nodes = nodes_of(steps, flow=flow)
    trajectory = calls_of(name.partition(":")[0], nodes)

    def denoise(x: np.ndarray, i: int) -> np.ndarray:
        at = trajectory.at[i]
        return at.alpha * S**2 * x / (at.alpha**2 * S**2 + at.sigma**2)

    states = list(sampler.sample(denoise, np.ones(1), trajectory, TorchNoise(0)))
    start, end = ((p.alpha**2 * S**2 + p.sigma**2) ** 0.5 for p in (nodes[0], nodes[-1]))
    return abs(float(states[-2][0]) - end / start)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_golden_errors_of_first_order(name: str) -> None:
    found = [gaussian_path_error(name, n) for n in (10, 20, 40, 80, 160)]
    assert found == pytest.approx([4.176e-2, 2.130e-2, 1.076e-2, 5.407e-3, 2.710e-3], rel=5e-4)  # published to four digits


def test_golden_errors_of_dpmpp_2m() -> None:
    found = [gaussian_path_error("dpmpp-2m", n) for n in (10, 20, 40, 80, 160)]
    assert found == pytest.approx([3.932e-4, 3.573e-4, 1.126e-4, 3.051e-5, 7.894e-6], rel=5e-4)  # published to four digits


# Measured and stated: a first step of lower order, which has no past, holds some methods down to two.
ORDERS = {
    ("dpmpp-2m:order=1", False): 1.0,
    ("dpmpp-2m:order=3", False): 2.0,
    ("dpmpp-2m:kind=heun", False): 2.0,
    ("deis:order=1", False): 1.0,
    ("deis:order=3", False): 2.0,
    ("unipc:order=1", False): 2.0,
    ("unipc:kind=bh1", False): 3.0,
    ("unipc:order=3", False): 3.0,
    ("unipc:order=3", True): 3.0,
    ("sa-solver:tau=0", False): 2.0,
    ("sa-solver:tau=0", True): 2.0,
    ("sa-solver:tau=0,predictor=1,corrector=1", False): 1.0,
    ("sa-solver:tau=0,predictor=3,corrector=3", False): 3.0,
}
OWN_POINTS = ("guided-distillation", "guided-distillation-stochastic", "fastdpm", "scm", "tcd")  # measured in test_few_step.py


def deterministic() -> Iterator[tuple[str, bool, float]]:
    for name in names("runtimes.samplers"):
        sampler = find("runtimes.samplers", name)
        if sampler.ORDER > 0 and name not in OWN_POINTS and not getattr(sampler, "PARALLEL", False):
            for flow in (False, True):
                if sampler.KIND in ("both", "flow" if flow else "diffusion"):
                    yield name, flow, sampler.ORDER
    for (text, flow), order in ORDERS.items():
        yield text, flow, order


@pytest.mark.parametrize(("text", "flow", "order"), list(deterministic()))
def test_order_of_convergence(text: str, flow: bool, order: float) -> None:
    coarse, fine = (gaussian_path_error(text, n, flow=flow) for n in (160, 320))
    # Halving the step divides the error by 2^order. The next term of the error is 1/160 of it for order 1, more for 2, and more
    # than the first one still for methods whose later steps are of a higher order: lms comes down to two from above.
    assert order - 0.06 < math.log2(coarse / fine) < order + (0.4 if text.startswith(("lms", "sa-solver")) else 0.08)


# Conformance: what holds for every file of the folder, the next one included.


@pytest.mark.parametrize("name", names("runtimes.samplers"))
class TestEverySampler:
    def trajectory(self, name: str, steps: int) -> tuple[Any, Points]:
        _, sampler = resolve(name)
        return sampler, sampler.points(FLOW if sampler.KIND == "flow" else STABLE_DIFFUSION, steps)

    def test_is_compared_with_something_else(self, name: str) -> None:
        module, tests = name.replace("-", "_"), [file for file in OWN_TESTS.glob("test_*.py") if file.name != Path(__file__).name]
        peers = {peer.sampler.partition(":")[0] for peer in PEERS}
        assert name in peers or any(re.search(rf"\b({module}|{name})\b", file.read_text()) for file in tests), "Test the new sampler."

    def test_calls_the_network_once_for_each_point_in_order(self, name: str) -> None:
        sampler, points = self.trajectory(name, 7)
        if getattr(sampler, "PARALLEL", False):
            pytest.skip("calls come in rounds")
        calls, states = [], []

        def denoise(x: np.ndarray, i: int) -> np.ndarray:
            if calls:
                assert x is states[-1] or np.array_equal(x, states[-1]), "a state is what the next call reads"
            calls.append(i)
            return x * np.float32(0.1)

        for state in sampler.sample(denoise, TorchNoise(0).normal(SHAPE), points, TorchNoise(1)):
            states.append(state)
            assert len(states) == len(calls), "one state after each call"
        assert calls == list(range(len(points)))
        assert [state.shape for state in states] == [SHAPE] * len(points)

    def test_refuses_the_other_kind_of_schedule(self, name: str) -> None:
        sampler = find("runtimes.samplers", name)
        for schedule, kind in ((FLOW, "flow"), (STABLE_DIFFUSION, "diffusion")):
            if sampler.KIND in ("both", kind):
                assert len(sampler.points(schedule, 6)) >= 6
            else:
                with pytest.raises(ArgumentError, match="is not made for a schedule of kind"):
                    sampler.points(schedule, 6)

    def test_finds_the_data_when_the_network_knows_it(self, name: str) -> None:
        sampler, points = self.trajectory(name, 5)
        target = TorchNoise(9).normal(SHAPE)
        *_, last = sampler.sample(lambda x, i: target, points.start(TorchNoise(0).normal(SHAPE)), points, TorchNoise(1))
        # Some end at the first training timestep, at alpha_bar 0.99915, rather than at the data (set_alpha_to_one).
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


# Options


@pytest.mark.parametrize(
    ("text", "name"),
    [("ddim", "ddim"), ("ddim:eta=0", "ddim"), ("ddim:eta=0.5", "ddim:eta=0.5"), ("unipc:order=3,kind=bh1", "unipc:kind=bh1,order=3")],
)
def test_a_name_lists_the_options_that_are_not_the_default(text: str, name: str) -> None:
    assert resolve(text)[0] == name
    assert resolve(name)[0] == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ddim:mu=1", "'ddim' has no option 'mu'.*Allowed: eta \\(a number, by default 0\\)"),
        ("euler:eta=1", "'euler' has no option 'eta'.*Allowed: none"),
        ("ddim:eta=much", "'eta' of 'ddim'.*Got: 'much'.*Allowed: a number"),
        ("ddim:eta=2", "'eta'.*Got: 2.*Allowed: 0 to 1"),
        ("ddim:eta=nan", "'eta'.*Got: nan.*Allowed: 0 to 1"),
        ("ddim:eta", "'eta' of 'ddim'.*Got: ''"),
        ("unipc:order=2.5", "'order' of 'unipc'.*Got: '2.5'.*Allowed: a whole number"),
        ("unipc:order=4", "'order'.*Got: 4.*Allowed: 1, 2, 3"),
        ("unipc:kind=bh3", "'kind'.*Got: bh3.*Allowed: bh1, bh2"),
        ("pndm:skip_prk_steps=no", "'skip_prk_steps' of 'pndm'.*Got: 'no'.*Allowed: true or false"),
    ],
)
def test_refuses_options(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        resolve(text)


def test_refuses_an_unknown_sampler_with_options() -> None:
    with pytest.raises(UnknownName, match="No sampler is called 'dim'.*'ddim'"):
        resolve("dim:eta=1")


def test_pndm_needs_steps_for_its_warm_up_and_a_common_distance() -> None:
    _, sampler = resolve("pndm:skip_prk_steps=false")
    with pytest.raises(ArgumentError, match="Got: 3.*4 and more"):
        sampler.points(STABLE_DIFFUSION, 3)
    with pytest.raises(ArgumentError, match="Got: karras.*leading, trailing, linspace"):
        sampler.points(replace(STABLE_DIFFUSION, spacing="karras"), 10)


@pytest.mark.parametrize(("name", "steps", "calls"), [("heun", 10, 19), ("dpm2", 10, 19), ("pndm", 10, 11), ("dpmpp-2s", 10, 10)])
def test_number_of_calls(name: str, steps: int, calls: int) -> None:
    assert len(resolve(name)[1].points(STABLE_DIFFUSION, steps)) == calls


def test_ddim_with_eta_one_is_ddpm() -> None:
    schedule = replace(STABLE_DIFFUSION, set_alpha_to_one=True)
    results = []
    for text in ("ddim:eta=1", "ddpm"):
        _, sampler = resolve(text)
        points, noise = sampler.points(schedule, 10), TorchNoise(2)
        *_, last = sampler.sample(lambda x, i: np.tanh(x), noise.normal(SHAPE), points, noise)
        results.append(last)
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-5)  # float32 over ten steps


@pytest.mark.parametrize(
    ("text", "error"),
    [
        *((text, 0.13) for text in ("ddpm", "ddim:eta=1", "euler-ancestral")),  # of first order: 9 to 10 % at 50 steps
        *((text, 0.055) for text in ("dpm2-ancestral", "dpmpp-2m-sde", "dpmpp-2m-sde:kind=heun", "dpmpp-3m-sde", "sa-solver")),
    ],
)
def test_noise_keeps_the_spread_of_gaussian_data(text: str, error: float) -> None:
    """With the exact denoiser of N(0, s^2), what comes out is N(0, s^2) again, up to the error of 50 steps."""
    _, sampler = resolve(text)
    points, noise = sampler.points(replace(STABLE_DIFFUSION, spacing="trailing"), 50), TorchNoise(4)

    def denoise(x: np.ndarray, i: int) -> np.ndarray:
        at = points.at[i]
        return np.float32(at.alpha * S**2 / (at.alpha**2 * S**2 + at.sigma**2)) * x

    *_, last = sampler.sample(denoise, points.start(noise.normal((4000,))), points, noise)
    # The deviation of 4,000 numbers is known to 1.1 %: three times that, and the error of the steps.
    assert last.std() == pytest.approx(S, rel=error)
