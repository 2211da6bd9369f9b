"""Samplers parallel in time: the picture of DDIM, the rounds they take, and the acceleration where it is known what it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import ddim, paradigms, parataa, resolve
from edgediffusion.runtimes.samplers._parallel import Round
from edgediffusion.runtimes.schedules import Points

from .tiny import STABLE_DIFFUSION, write_bundle

SHAPE = (2, 4, 8, 8)
LINEAR = NoiseSchedule("linear", 1000, 1e-4, 0.02)
SAMPLERS = {"paradigms": paradigms, "parataa": parataa}
EXACT = {"paradigms": paradigms.Options(tolerance=0.0), "parataa": parataa.Options(absolute=0.0, relative=0.0)}


def network(points: Points) -> Callable[[np.ndarray, int], np.ndarray]:
    """A smooth fake network with an opinion about x_0, float32 as a real one."""
    slope = np.linspace(-1, 1, SHAPE[-1], dtype=np.float32)

    def denoise(x: np.ndarray, i: int) -> np.ndarray:
        at = points.at[i]
        found: np.ndarray = 2 * np.tanh(np.float32(0.5 * at.alpha) * x + np.float32(math.cos(at.timestep / 300)) * slope)
        return found

    return denoise


def many(points: Points) -> Callable[[Sequence[np.ndarray], Sequence[int]], list[np.ndarray]]:
    denoise = network(points)
    return lambda states, indices: [denoise(x, i) for x, i in zip(states, indices, strict=True)]


def rounds(name: str, steps: int, options: Any, schedule: NoiseSchedule = LINEAR) -> tuple[list[Round], np.ndarray]:
    points = SAMPLERS[name].points(schedule, steps)
    found = list(SAMPLERS[name].rounds(many(points), TorchNoise(0).normal(SHAPE), points, TorchNoise(1), options))
    return found, found[-1].states[-1]


def one_after_the_other(steps: int, schedule: NoiseSchedule = LINEAR, eta: float = 0.0) -> list[np.ndarray]:
    points = ddim.points(schedule, steps)
    return list(ddim.sample(network(points), TorchNoise(0).normal(SHAPE), points, TorchNoise(1), ddim.Options(eta)))


@pytest.mark.parametrize("name", SAMPLERS)
class TestBoth:
    @pytest.mark.parametrize("steps", [1, 2, 10, 25])
    @pytest.mark.parametrize("window", [1, 4, 100])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_without_tolerance_the_states_are_those_of_ddim(self, name: str, window: int, steps: int, eta: float) -> None:
        expected = one_after_the_other(steps, eta=eta)
        found, _ = rounds(name, steps, replace(EXACT[name], window=window, eta=eta))
        states = [state for each in found for state in each.states]
        assert len(states) == steps
        for state, target in zip(states, expected, strict=True):
            assert state.dtype == np.float32
            # Up to 25 float32 steps, summed in another order; the first divides by an alpha of 0.006, of which little is left.
            np.testing.assert_allclose(state, target, rtol=0, atol=2e-5 * np.abs(target).max())

    @pytest.mark.parametrize("steps", [10, 30])
    def test_never_takes_more_rounds_than_steps(self, name: str, steps: int) -> None:
        found, _ = rounds(name, steps, EXACT[name])
        assert len(found) <= steps
        assert all(each.states for each in found)
        assert all(each.calls <= 10 for each in found)

    def test_a_tolerance_saves_rounds_and_costs_calls(self, name: str) -> None:
        found, last = rounds(name, 50, SAMPLERS[name].Options())
        expected = one_after_the_other(50)[-1]
        assert len(found) < 25
        assert sum(each.calls for each in found) > 50
        assert float(np.sqrt(((last - expected) ** 2).mean())) < 0.05 * float(expected.std())

    def test_a_smaller_tolerance_is_nearer(self, name: str) -> None:
        expected = one_after_the_other(50)[-1]
        errors = []
        for part in (1.0, 0.1):
            options = SAMPLERS[name].Options()
            scaled = {key: getattr(options, key) * part for key in ("tolerance", "absolute", "relative") if hasattr(options, key)}
            errors.append(float(((rounds(name, 50, replace(options, **scaled))[1] - expected) ** 2).mean()))
        assert errors[1] < errors[0]

    def test_a_window_of_one_is_one_after_the_other(self, name: str) -> None:
        found, _ = rounds(name, 12, replace(SAMPLERS[name].Options(), window=1))
        assert [(each.calls, len(each.states)) for each in found] == [(1, 1)] * 12

    def test_as_a_sampler_it_yields_every_state_once(self, name: str) -> None:
        _, sampler = resolve(f"{name}:window=5")
        points = sampler.points(STABLE_DIFFUSION, 20)
        states = list(sampler.sample(network(points), TorchNoise(0).normal(SHAPE), points, TorchNoise(1)))
        assert len(states) == 20
        assert {state.dtype for state in states} == {np.dtype(np.float32)}

    def test_refuses_pure_noise(self, name: str) -> None:
        with pytest.raises(ArgumentError, match=rf"'{name}' cannot start from pure noise"):
            SAMPLERS[name].points(replace(STABLE_DIFFUSION, zero_terminal_snr=True, spacing="trailing"), 4)

    @pytest.mark.parametrize("option", ["window=0", "eta=2"])
    def test_refuses_options(self, name: str, option: str) -> None:
        with pytest.raises(ArgumentError, match="cannot be used"):
            resolve(f"{name}:{option}")


def test_a_constant_estimate_of_the_noise_takes_two_rounds() -> None:
    """Where epsilon does not depend on the state, one round finds every state and another one sees that they stay."""
    points = paradigms.points(LINEAR, 10)
    epsilon = TorchNoise(7).normal(SHAPE)

    def denoise(states: Sequence[np.ndarray], indices: Sequence[int]) -> list[np.ndarray]:
        return [(x - points.at[i].sigma * epsilon) / points.at[i].alpha for x, i in zip(states, indices, strict=True)]

    found = list(parataa.rounds(denoise, TorchNoise(0).normal(SHAPE), points, TorchNoise(1), parataa.Options(order=10)))
    assert len(found) == 2


def test_golden_extrapolation() -> None:
    """One number a state: X 1 -> 2, R 1 -> 0.5 foretells R = 0 at gamma = -1: the state moves by 0.5 + (1 - 0.5) = 1, to 3."""
    one = np.ones((1, 1), np.float32)
    history = [{1: (0 * one, 0 * one), 2: (one, one)}, {1: (0 * one, 0 * one), 2: (2 * one, 0.5 * one)}]
    changes = parataa._changes(history, range(2), 1, 1e-12)
    assert float(changes[2][0, 0]) == pytest.approx(1.0)
    assert float(changes[1][0, 0]) == 0


def test_later_states_do_not_disturb_earlier_ones() -> None:
    """The triangle: the change of a state is the same whatever the states after it did."""
    random = np.random.default_rng(0)

    def residuals(last: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {i: tuple(random.standard_normal((2, 6)).astype(np.float32) for _ in range(2)) for i in range(1, last)}  # type: ignore[misc]

    history = [residuals(5) for _ in range(3)]
    whole = parataa._changes(history, range(4), 0, 1e-3)
    part = parataa._changes([{i: each[i] for i in (1, 2)} for each in history], range(2), 0, 1e-3)
    for i in (1, 2):
        np.testing.assert_array_equal(whole[i], part[i])


def test_acceleration_takes_fewer_rounds() -> None:
    """The paper's claim, on this network: 100 steps in one window, each state from the one before it."""
    plain, accelerated = (len(rounds("parataa", 100, parataa.Options(window=100, order=1, memory=memory))[0]) for memory in (1, 2))
    assert accelerated < plain / 2  # 7 and 26


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("options", "what"), [({"cache": "adaptive-diffusion"}, "a cache"), ({"correction": "qncd"}, "a correction")])
def test_refuses_what_counts_calls_or_changes_states(tmp_path: Path, name: str, options: dict[str, Any], what: str) -> None:
    pytest.importorskip("onnxruntime")
    pipe = Pipeline.from_bundle(write_bundle(tmp_path / "bundle"), threads=1)
    with pytest.raises(ArgumentError, match=f"'{name}' asks about several steps at once, and cannot go with {what}"):
        pipe("a red shirt", sampler=name, **options)
    drawn, one_by_one = (pipe("a red shirt", sampler=text, num_inference_steps=6).latents for text in (f"{name}:window=1", "ddim"))
    # float32, six steps in another form of the same equation.
    np.testing.assert_allclose(drawn, one_by_one, rtol=0, atol=2e-5 * np.abs(one_by_one).max())
