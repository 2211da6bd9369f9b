"""The stream batch against the same steps taken frame by frame, and the filter that leaves frames out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.denoiser import to_epsilon
from edgediffusion.runtimes.samplers import lcm
from edgediffusion.runtimes.streaming import residual
from edgediffusion.runtimes.streaming.batch import StreamBatch
from edgediffusion.runtimes.streaming.filter import SimilarityFilter, skip_probability

SCHEDULE = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012)
STEPS, SHAPE = 4, (3, 5, 5)


def network(x: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Not linear, and another for each time step."""
    result: np.ndarray = np.tanh(1.3 * x + timesteps.reshape(-1, 1, 1, 1) / 700).astype(np.float32)
    return result


def unconditional(x: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.cos(x) * 0.5 + timesteps.reshape(-1, 1, 1, 1) / 2000
    return result


def with_unconditional(x: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    own = len(x) - STEPS
    return np.concatenate([unconditional(x[:own], timesteps[:own]), network(x[own:], timesteps[own:])])


def batch(**options: object) -> StreamBatch:
    points = lcm.points(SCHEDULE, STEPS).at
    noise = np.random.default_rng(0).standard_normal((STEPS, *SHAPE)).astype(np.float32)
    return StreamBatch(points, noise, options.pop("predict", network), **options)  # type: ignore[arg-type]


def alone(stream: StreamBatch, latent: np.ndarray, predict: object = network) -> np.ndarray:
    """One frame through all steps, as the consistency sampler takes them, with the row's noise at each."""
    x = stream.enter(latent)
    for i, point in enumerate(stream.points):
        epsilon = to_epsilon(stream.prediction, x, predict(x, np.array([point.timestep])), point)  # type: ignore[operator]
        skip, out = lcm.boundary(point.timestep)
        x0 = skip * x + out * (x - point.sigma * epsilon) / point.alpha
        if i + 1 < len(stream.points):
            x = stream.points[i + 1].alpha * x0 + stream.points[i + 1].sigma * stream.noise[i + 1 : i + 2]
    return x0


def frames(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).standard_normal((count, 1, *SHAPE)).astype(np.float32))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_every_frame_comes_out_as_if_it_were_alone(prediction: str) -> None:
    stream, given = batch(prediction=prediction), frames(9)
    found = [stream.step(stream.enter(frame)) for frame in given]
    assert all(frame is None for frame in found[: STEPS - 1])
    for frame, latent in zip(given, found[STEPS - 1 :], strict=False):
        np.testing.assert_allclose(latent, alone(stream, frame), rtol=2e-5, atol=2e-5)


def test_full_guidance_is_classifier_free_guidance() -> None:
    scale = 2.5
    stream = batch(predict=with_unconditional, guidance="full", scale=scale)

    def both(x: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        return unconditional(x, timesteps) + scale * (network(x, timesteps) - unconditional(x, timesteps))

    given = frames(STEPS + 2)
    found = [stream.step(stream.enter(frame)) for frame in given]
    np.testing.assert_allclose(found[-1], alone(stream, given[2], both), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", residual.RESIDUAL)
def test_residual_guidance_of_scale_one_is_none(kind: str) -> None:
    plain, guided = batch(), batch(guidance=kind, scale=1.0, predict=network if kind == "self" else with_unconditional)
    for frame in frames(STEPS + 2):
        expected, found = plain.step(plain.enter(frame)), guided.step(guided.enter(frame))
    assert expected is not None
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_stock_noise_of_one_pixel_by_hand() -> None:
    """Two steps, one pixel, noise (1, -2): the formulas of METHODS' sources with the numbers written out."""
    points = lcm.points(SCHEDULE, 2).at
    (a0, s0), (a1, s1) = ((p.alpha, p.sigma) for p in points)
    noise = np.array([1.0, -2.0], np.float32).reshape(2, 1, 1, 1)
    stream = StreamBatch(points, noise, lambda x, t: 0 * x + 0.25, guidance="self", scale=1.5, delta=0.8)
    skip, out = zip(*(lcm.boundary(p.timestep) for p in points), strict=True)

    def consistent(x: float, epsilon: float, i: int) -> float:
        alpha, sigma = ((a0, s0), (a1, s1))[i]
        return skip[i] * x + out[i] * (x - sigma * epsilon) / alpha

    first = float(stream.enter(np.full((1, 1, 1, 1), 0.5))[0, 0, 0, 0])
    assert first == pytest.approx(a0 * 0.5 + s0 * 1.0)
    stream.step(stream.enter(np.full((1, 1, 1, 1), 0.5)))
    # The stock of the first row is its fixed noise, that of the second began as nothing.
    e0, e1 = (u + 1.5 * (0.25 - u) for u in (0.8 * 1.0, 0.8 * 0.0))
    x0 = consistent(first, e0, 0)
    moved = (consistent(s0 * 1.0, e0, 0) * a1 / s1, consistent(s1 * 0.0, e1, 1))
    stock = (-2.0 + moved[0], 1.0 + moved[1])
    # In the next call the stock moves on with the rows.
    second = a1 * x0 + s1 * -2.0
    e1 = 0.8 * stock[0] + 1.5 * (0.25 - 0.8 * stock[0])
    found = stream.step(stream.enter(np.full((1, 1, 1, 1), 0.5)))
    assert found is not None
    assert float(found[0, 0, 0, 0]) == pytest.approx(consistent(second, e1, 1), rel=1e-4)


def test_rows_of_a_call() -> None:
    assert [residual.rows(kind, 4) for kind in residual.KINDS] == [(0, 4), (4, 4), (0, 4), (1, 4)]
    x = np.arange(4.0)
    assert [len(residual.fed(kind, x)) for kind in residual.KINDS] == [4, 8, 4, 5]
    for before, after in pairwise(residual.fed("initialize", x)[1:]):
        assert after == before + 1


def test_skip_probabilities() -> None:
    assert skip_probability(0.985, 0.98) == pytest.approx(0.25)
    assert skip_probability(0.99, 0.98) == pytest.approx(0.5)
    assert skip_probability(0.98, 0.98) == pytest.approx(0, abs=1e-9)
    assert skip_probability(0.9, 0.98) == 0
    assert skip_probability(1.0, 0.98) == 1
    assert skip_probability(1.0, 1.0) == 0


def test_equal_frames_are_left_out_eleven_times_then_one_passes() -> None:
    still, frame = SimilarityFilter(), np.ones((2, 2, 3))
    skipped = [still.skips(frame) for _ in range(26)]
    assert skipped == [False, *[True] * 11, False, *[True] * 11, False, True]


def test_other_frames_pass_and_become_what_is_compared_with() -> None:
    moving = SimilarityFilter()
    axes = np.eye(4)
    assert not any(moving.skips(axes[i % 4]) for i in range(20))


def test_black_frames_are_alike() -> None:
    dark = SimilarityFilter()
    assert [dark.skips(np.zeros(4)) for _ in range(3)] == [False, True, True]


def test_lots_are_drawn_from_the_seed() -> None:
    frames = np.random.default_rng(0).normal(5, 0.7, (60, 50))
    drawn = [[SimilarityFilter(seed=seed)] for seed in (1, 1, 2)]
    found = [[each[0].skips(frame) for frame in frames] for each in drawn]
    assert found[0] == found[1] != found[2]
    assert 0 < sum(found[0]) < 60
