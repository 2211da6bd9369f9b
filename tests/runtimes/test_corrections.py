"""Corrections of quantization noise: the numbers of their papers, what they do to a generation, and what their file refuses."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule, Verb
from edgediffusion.errors import ArgumentError, OutputError, UnknownName
from edgediffusion.files import dump_json
from edgediffusion.registry import find, names
from edgediffusion.runtimes.corrections import REGISTRY, Corrector, Deployment, Run, Terms, d2_dpm, ptqd, qncd, tac_qdm
from edgediffusion.runtimes.corrections._apply import Applied, calibrated, noise_left
from edgediffusion.runtimes.corrections._file import Correction, graph_digest, measured, resolve
from edgediffusion.runtimes.corrections._moments import Bounds, Moments
from edgediffusion.runtimes.denoiser import epsilon_gain, to_epsilon, to_x0
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import ddim, euler_ancestral
from edgediffusion.runtimes.schedules import Point, Points, variance_preserving

from .test_pipeline import PROMPT, Fakes, predict
from .tiny import STABLE_DIFFUSION

METHODS = names(REGISTRY)
MEASURED = [name for name in METHODS if hasattr(find(REGISTRY, name).Method, "fit")]
CHANNELS, STEPS = 4, 3
HERE = Deployment("m" * 64, "g" * 64, "s" * 64, "ddim", STEPS, 5.0)
# The published figures are of a table in float64; the product's is rounded to float32 as diffusers' is.
BARS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
AT, TO = (variance_preserving(BARS, t) for t in (499, 249))


def pairs(size: int = 16_384, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The papers' model of the error, d = 0.1 e + 0.02 + N(0, 0.03^2), on 4 channels of ``size`` numbers: e and q."""
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((1, CHANNELS, size))
    return e, 1.1 * e + 0.02 + 0.03 * rng.standard_normal(e.shape)


def moments_of(reference: np.ndarray, quantized: np.ndarray, *, steps: int = 1, bounds: Bounds | None = None) -> Moments:
    moments = Moments.empty(steps, reference.shape[1])
    for i in range(steps):
        moments.add(i, reference, quantized, bounds=bounds)
    return moments


def run_of(**changes: Any) -> Run:
    points = Points((AT,) * STEPS, (TO,) * STEPS)
    return replace(Run(HERE, "epsilon", ddim, points, TorchNoise(1), lambda x, at: x), **changes)


def correction(method: str = "ptqd", **options: Any) -> Correction:
    rule = measured(method, options)
    parameters = rule.fit(moments_of(*pairs(256), steps=STEPS))
    if rule.DRIFT:
        parameters["drift"] = np.arange(STEPS * CHANNELS, dtype=np.float64).reshape(STEPS, CHANNELS) / 100
    return Correction(method, dict(vars(rule)), HERE, parameters, {"samples": 1, "seed": 0})


# A band of four standard errors: the figures are estimates on 65,536 numbers of noise 0.03, so 1.2e-4 for a slope or a mean.
BAND = 4 * 0.03 / math.sqrt(65_536)


class TestGolden:
    def test_ptqd_finds_slope_bias_and_spread(self) -> None:
        found = ptqd.Method().fit(moments_of(*pairs()))
        assert found["k"][0] == pytest.approx(0.1001, abs=BAND)
        assert found["b"].mean() == pytest.approx(0.0201, abs=BAND)
        assert found["sigma"][0] == pytest.approx(0.0300, abs=BAND)

    def test_ptqd_leaves_what_theory_says(self) -> None:
        e, q = pairs()
        terms = ptqd.Method().terms(ptqd.Method().fit(moments_of(e, q)))
        left = terms.scale[0] * q + terms.shift[0][:, None] - e
        assert (q - e).std() == pytest.approx(0.10415, abs=5 * BAND)  # 0.1 of e's own deviation counts here
        assert left.std() == pytest.approx(0.03 / 1.1, abs=BAND)
        assert terms.residual is not None
        assert terms.residual[0, 0] == pytest.approx(left.std(), rel=1e-3)  # one is of q's own bias, the other of its channels'

    def test_ptqd_uses_k_only_where_it_is_positive(self) -> None:
        e, _ = pairs()
        found = ptqd.Method().fit(moments_of(e, 0.9 * e + 0.02))
        assert found["k"].tolist() == [0.0]
        np.testing.assert_allclose(found["b"][0], 0.02 - 0.1 * e.mean(axis=(0, 2)), atol=1e-12)  # float64
        np.testing.assert_allclose(found["sigma"], (0.1 * e).std(axis=2).mean(), rtol=1e-12)

    def test_ptqd_has_a_bias_for_each_channel(self) -> None:
        e, _ = pairs()
        bias = np.array([0.1, -0.2, 0.0, 0.4])
        found = ptqd.Method().fit(moments_of(e, e + bias[:, None]))
        # The slope of a bias on e is chance: e's channels differ by their means, of 1/128.
        np.testing.assert_allclose(found["b"][0], bias, atol=1e-3)

    @pytest.mark.parametrize("granularity", ["tensor", "channel"])
    def test_d2_dpm_finds_the_same_residual(self, granularity: str) -> None:
        method = d2_dpm.Method(granularity=granularity)
        found = method.fit(moments_of(*pairs()))
        assert found["rho"].mean() == pytest.approx(0.9651, abs=4e-4)  # a standard error is (1 - rho^2) / 256 = 2.7e-4
        terms = method.terms(found)
        assert terms.residual is not None
        assert terms.residual.mean() == pytest.approx(0.02728, abs=BAND)
        e, q = pairs()
        left = terms.scale[0][:, None] * q[0] + terms.shift[0][:, None] - e[0]
        np.testing.assert_allclose(left.reshape(len(terms.residual[0]), -1).std(axis=1), terms.residual[0], rtol=1e-9)

    def test_d2_dpm_without_correlation_subtracts_the_mean_alone(self) -> None:
        rng = np.random.default_rng(0)
        q, d = rng.standard_normal((2, 1, 1, 1000))
        d -= q * (q * (d - d.mean())).sum() / (q * (q - q.mean())).sum()  # made exactly uncorrelated
        terms = d2_dpm.Method().terms(d2_dpm.Method().fit(moments_of(q - d, q)))
        assert terms.scale[0, 0] == pytest.approx(1.0, abs=1e-12)
        assert terms.shift[0, 0] == pytest.approx(-d.mean(), abs=1e-12)
        assert terms.residual is not None
        assert terms.residual[0, 0] == pytest.approx(d.std(), rel=1e-12)

    def test_d2_dpm_with_full_correlation_leaves_next_to_nothing(self) -> None:
        e, _ = pairs()
        found = d2_dpm.Method().fit(moments_of(e, 1.5 * e + 0.3))
        assert found["rho"].ravel().tolist() == [0.9999] * CHANNELS
        terms = d2_dpm.Method().terms(found)
        assert terms.residual is not None
        np.testing.assert_allclose(terms.residual, found["sigma_d"] * math.sqrt(1 - 0.9999**2))
        np.testing.assert_allclose(terms.scale, 1 - 0.9999 / 3, rtol=1e-9)

    def test_tac_qdm_takes_the_least_squares_factor(self) -> None:
        e, q = pairs()
        found = tac_qdm.Method().fit(moments_of(e, q))
        np.testing.assert_allclose(found["K"][0], (e * q).sum(axis=(0, 2)) / (q * q).sum(axis=(0, 2)), rtol=1e-12)

    def test_coefficient_of_epsilon_in_ddims_step(self) -> None:
        """c at eta = 0, from what an error of one does to the state; Stable Diffusion, timestep 499 to 249."""
        points, x = Points((AT,), (TO,)), np.zeros((1, 1, 1, 1))
        (clean,) = ddim.sample(lambda x, i: to_x0("epsilon", x, np.zeros(1), AT), x, points, TorchNoise(0))
        (moved,) = ddim.sample(lambda x, i: to_x0("epsilon", x, np.ones(1), AT), x, points, TorchNoise(0))
        assert (moved - clean).item() == pytest.approx(-0.75583726, abs=1e-8)  # published with its last digit cut

    def test_variance_calibration(self) -> None:
        """Ancestral noise is DDIM's with eta = 1."""
        s, c = euler_ancestral.noise_terms(AT, TO)
        assert s * s == pytest.approx(0.26461320, abs=5e-9)
        assert s == pytest.approx(0.51440568, abs=5e-9)
        assert c == pytest.approx(-1.08068976, abs=5e-9)
        assert calibrated(s * s, c, np.array(0.05)) == pytest.approx(0.26169348, abs=5e-9)
        assert calibrated(s * s, c, np.array(0.5)) == 0.0


class TestMoments:
    def test_batches_add_up_to_what_all_at_once_gives(self) -> None:
        rng = np.random.default_rng(0)
        e = rng.standard_normal((6, CHANNELS, 5, 7)) + 100.0
        q = e + 1e-3 * rng.standard_normal(e.shape)
        moments = Moments.empty(2, CHANNELS)
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            moments.add(1, e[part], q[part])
        for c in range(CHANNELS):
            flat = np.stack([e[:, c].ravel(), (q - e)[:, c].ravel()])
            np.testing.assert_allclose(moments.mean[1, c], flat.mean(axis=1), rtol=1e-12)
            np.testing.assert_allclose(moments.covariance[1, c], np.cov(flat, bias=True), rtol=1e-9)
        whole = moments.pooled()
        everything = np.stack([e.ravel(), (q - e).ravel()])
        np.testing.assert_allclose(whole.mean[1, 0], everything.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(whole.covariance[1, 0], np.cov(everything, bias=True), rtol=1e-9)
        assert moments.count[0].sum() == 0

    def test_outliers_are_left_out(self) -> None:
        e, q = pairs()
        spoilt = q.copy()
        spoilt[0, :, :10] += 50.0
        first = moments_of(e, spoilt)
        kept = moments_of(e, spoilt, bounds=Bounds.of(first, 4.0))
        assert kept.count.tolist() == [[16_374] * CHANNELS]
        np.testing.assert_allclose(kept.covariance, moments_of(e[..., 10:], q[..., 10:]).covariance, rtol=1e-9)

    def test_error_of_a_scale_and_a_shift(self) -> None:
        e, q = pairs(1000)
        scale, shift = np.array([[0.7, 0.8, 0.9, 1.0]]), np.array([[0.1, 0.0, -0.1, 0.3]])
        found = moments_of(e, q).errors(scale, shift)
        expected = ((scale[0][:, None] * q[0] + shift[0][:, None] - e[0]) ** 2).mean(axis=1)
        np.testing.assert_allclose(found[0], expected, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_every_prediction_tells_the_same_epsilon_and_how_its_errors_count(prediction: str) -> None:
    x0, noise = TorchNoise(1).normal((1, 4, 8, 8)), TorchNoise(2).normal((1, 4, 8, 8))
    alpha, sigma = (0.4, 0.6) if prediction == "flow" else (0.6, 0.8)
    at, x = Point(alpha, sigma, 0.0), alpha * x0 + sigma * noise
    output = {"epsilon": noise, "v": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}[prediction]
    found = to_epsilon(prediction, x, output, at)
    np.testing.assert_allclose(found, noise, atol=2e-6)  # float32, numbers up to 4, three operations
    moved = to_epsilon(prediction, x.astype(np.float64), output + 0.5, at) - to_epsilon(prediction, x.astype(np.float64), output, at)
    np.testing.assert_allclose(moved, 0.5 * epsilon_gain(prediction, at), atol=1e-6)


NOISE_BEYOND = ("tcd",)  # its noise leads on from where a step arrives, to a point that a step's two points do not tell


@pytest.mark.parametrize("name", names("runtimes.samplers"))
class TestEverySampler:
    def trajectory(self, name: str, steps: int) -> tuple[Any, Points]:
        sampler = find("runtimes.samplers", name)
        try:
            return sampler, sampler.points(STABLE_DIFFUSION, steps)
        except ArgumentError:
            return sampler, sampler.points(NoiseSchedule("flow", 1000, shift=3.0), steps)

    def test_states_its_noise_and_its_coefficient_if_it_adds_noise(self, name: str) -> None:
        """Both are read off the sampler: what a step does with noise of one, and with an epsilon that is off by one."""
        sampler, points = self.trajectory(name, 6)

        class Ones:
            def normal(self, shape: Any) -> np.ndarray:
                return np.full(shape, self.value)

            def __init__(self, value: float):
                self.value = value

        def state(i: int, noise: float, error: float) -> float:
            def denoise(x: np.ndarray, k: int) -> np.ndarray:
                return np.zeros(1) if error == 0 else -error * points.at[i].sigma / points.at[i].alpha * np.ones(1)

            # A step in the middle, and one after it: samplers treat the last in a way of their own.
            part = Points((points.at[i], *points.at[i:][:1]), (points.to[i],) * 2)
            return next(iter(sampler.sample(denoise, np.zeros(1), part, Ones(noise)))).item()

        if name in NOISE_BEYOND:
            return
        adds_noise = state(2, 1.0, 0.0) != 0
        assert hasattr(sampler, "noise_terms") or not adds_noise
        for i in range(len(points) - 1) if hasattr(sampler, "noise_terms") else ():
            s, c = sampler.noise_terms(points.at[i], points.to[i])
            assert state(i, 1.0, 0.0) == pytest.approx(s, rel=1e-9)
            assert state(i, 0.0, 1.0) == pytest.approx(c, rel=1e-9)

    def test_what_is_added_to_a_state_counts(self, name: str) -> None:
        sampler, points = self.trajectory(name, 4)
        if getattr(sampler, "PARALLEL", False):
            pytest.skip("corrections are refused beside it")
        seen = []

        def denoise(x: np.ndarray, i: int) -> np.ndarray:
            seen.append(x.copy())
            return x * np.float32(0.1)

        changed = []
        for state in sampler.sample(denoise, TorchNoise(0).normal((1, 4, 4, 4)), points, TorchNoise(1)):
            state += 7.0
            changed.append(state.copy())
        np.testing.assert_array_equal(seen[1:], changed[:-1])


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_is_measured_or_starts_by_itself(self, name: str) -> None:
        method = find(REGISTRY, name).Method
        assert hasattr(method, "fit") != hasattr(method, "start")
        assert method() == method()

    def test_is_documented_with_its_paper(self, name: str) -> None:
        paper = re.search(r"\((\d{4}\.\d{5})\)|\((\d{4}\.\d{5}),", find(REGISTRY, name).__doc__ or "")
        assert paper is not None, "Name the paper by its arXiv number."
        document = (Path(__file__).parents[2] / "docs" / "corrections.md").read_text(encoding="utf-8")
        assert f"| `{name}` ({paper[1] or paper[2]})" in document


@pytest.mark.parametrize("name", MEASURED)
class TestEveryMeasuredMethod:
    def test_a_network_without_error_is_left_alone(self, name: str) -> None:
        e, _ = pairs(500)
        rule = measured(name, {})
        terms = rule.terms(rule.fit(moments_of(e, e, steps=STEPS)))
        np.testing.assert_allclose(terms.scale, 1.0, atol=1e-12)
        np.testing.assert_allclose(terms.shift, 0.0, atol=1e-12)
        np.testing.assert_allclose(0.0 if terms.residual is None else terms.residual, 0.0, atol=1e-9)

    def test_a_channel_of_nothing_but_zeros_gives_numbers(self, name: str) -> None:
        rule = measured(name, {})
        zeros = np.zeros((1, CHANNELS, 8))
        terms = rule.terms(rule.fit(moments_of(zeros, zeros, steps=STEPS)))
        for array in (terms.scale, terms.shift, terms.residual):
            assert array is None or np.isfinite(array).all()

    def test_an_error_that_goes_with_the_prediction_is_undone(self, name: str) -> None:
        e, q = pairs()
        rule = measured(name, {})
        moments = moments_of(e, q)
        terms = rule.terms(rule.fit(moments))
        plain, left = moments.errors(np.ones((1, 4)), np.zeros((1, 4))).mean(), moments.errors(terms.scale, terms.shift).mean()
        assert left < plain / 5

    def test_terms_have_a_row_for_every_step(self, name: str) -> None:
        found = correction(name)
        terms = found.rule.terms(found.parameters)
        for array in (terms.scale, terms.shift, terms.residual, terms.spread, terms.drift):
            assert array is None or array.shape in ((STEPS, 1), (STEPS, CHANNELS))

    def test_survives_its_file_bit_for_bit(self, name: str, tmp_path: Path) -> None:
        found = correction(name)
        found.save(tmp_path / "a.json")
        again = Correction.load(tmp_path / "a.json")
        assert again.digest == found.digest
        assert {k: v.tobytes() for k, v in again.parameters.items()} == {k: v.tobytes() for k, v in found.parameters.items()}
        again.save(tmp_path / "b.json")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()

    def test_runs(self, name: str) -> None:
        corrector = correction(name).start(run_of())
        output, x = TorchNoise(0).normal((2, CHANNELS, 5, 6)), TorchNoise(2).normal((2, CHANNELS, 5, 6))
        for i in range(STEPS):
            corrector.prediction(output, x, i)
            corrector.state(x, i)
        assert output.dtype == x.dtype == np.float32
        assert np.isfinite(output).all()


class TestApplied:
    def test_scales_and_shifts_in_place_by_step_and_channel(self) -> None:
        scale, shift = np.random.default_rng(0).standard_normal((2, STEPS, CHANNELS))
        corrector = Applied(Terms(scale, shift), run_of())
        for i in range(STEPS):
            output = TorchNoise(i).normal((2, CHANNELS, 3, 5))
            expected = scale[i].reshape(-1, 1, 1) * output + shift[i].reshape(-1, 1, 1)
            corrector.prediction(output, output, i)
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)  # float32, two operations

    def test_drift_is_added_to_the_state(self) -> None:
        drift = np.arange(STEPS * CHANNELS).reshape(STEPS, CHANNELS) / 10
        corrector = Applied(Terms(np.ones((STEPS, 1)), np.zeros((STEPS, 1)), drift=drift), run_of())
        x = np.zeros((2, CHANNELS, 3, 3), np.float32)
        corrector.state(x, 2)
        np.testing.assert_allclose(x[1, :, 0, 0], drift[2], rtol=1e-6)  # float32

    def test_a_stochastic_correction_adds_noise_of_the_residual(self) -> None:
        found = correction("d2-dpm", mode="stochastic")
        terms = found.rule.terms(found.parameters)
        assert terms.spread is not None
        assert terms.residual is None
        output = np.zeros((1, CHANNELS, 128, 128), np.float32)
        found.start(run_of()).prediction(output, output, 1)
        # 16,384 numbers a channel: four standard errors are 1/45.
        np.testing.assert_allclose(output.std(axis=(0, 2, 3)), terms.spread[1], rtol=1 / 45)

    @pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
    def test_a_stochastic_sampler_adds_less_noise(self, prediction: str) -> None:
        run = run_of(sampler=euler_ancestral, prediction=prediction)
        residual = np.array([[0.05], [0.0], [5.0]]) / abs(epsilon_gain(prediction, AT))  # of the prediction; 0.05 of epsilon
        corrector = Applied(Terms(np.ones((STEPS, 1)), np.zeros((STEPS, 1)), residual=residual), run)
        noise = corrector.noise(TorchNoise(5))
        for i, expected in enumerate((math.sqrt(0.26169348 / 0.26461320), 1.0, 0.0)):
            corrector.prediction(np.zeros((1, 1, 4, 4), np.float32), np.zeros((1, 1, 4, 4), np.float32), i)
            fresh = TorchNoise(5)
            for _ in range(i):
                fresh.normal((1, 1, 4, 4))
            np.testing.assert_allclose(noise.normal((1, 1, 4, 4)), expected * fresh.normal((1, 1, 4, 4)), rtol=1e-6)

    def test_the_last_ancestral_step_has_no_noise_to_lessen(self) -> None:
        points = euler_ancestral.points(STABLE_DIFFUSION, STEPS)
        left = noise_left(np.full((STEPS, 1), 0.1), run_of(sampler=euler_ancestral, points=points))
        assert left is not None
        assert left[-1].item() == 1.0
        assert np.isfinite(left).all()

    def test_a_deterministic_sampler_keeps_its_stream(self) -> None:
        noise = TorchNoise(0)
        assert correction("ptqd").start(run_of()).noise(noise) is noise


class TestQncd:
    def test_estimates_by_taking_the_state_one_step_back(self) -> None:
        """A network that answers its input's mean plus 0.5 everywhere: the bias found is that less the mean of the fresh noise."""
        asked = []

        def answer(x: np.ndarray, at: Point) -> np.ndarray:
            asked.append((x, at))
            return np.full(x.shape, 0.5, np.float32)

        points = Points((AT, TO, TO), (TO, TO, TO))
        corrector = qncd.Method().start(run_of(points=points, predict=answer, noise=TorchNoise(3)))
        x = TorchNoise(1).normal((2, CHANNELS, 8, 8))
        outputs = [np.ones_like(x) for _ in range(3)]
        for i, output in enumerate(outputs):
            corrector.prediction(output, x, i)
        e = TorchNoise(3).normal(x.shape)
        ((state, at),) = asked
        ratio = (AT.alpha / TO.alpha) ** 2  # of the alpha bars
        assert at == AT
        np.testing.assert_allclose(state, math.sqrt(ratio) * x + math.sqrt(1 - ratio) * e, rtol=1e-5, atol=1e-6)  # float32
        assert (outputs[0] == 1).all()
        bias = 0.5 - e.mean(axis=(1, 2, 3), keepdims=True)
        for output in outputs[1:]:
            np.testing.assert_allclose(output, np.broadcast_to(1 - bias, x.shape), rtol=0, atol=1e-6)  # float32

    @pytest.mark.parametrize(("every", "calls"), [(1, 9), (3, 3), (10, 1)])
    def test_costs_one_call_in_every_few_steps(self, tmp_path: Path, every: int, calls: int) -> None:
        fakes = Fakes(tmp_path / "bundle")
        fakes.pipe(PROMPT, num_inference_steps=10, correction=qncd.Method(every))
        assert len(fakes.denoise.calls) == 10 + calls

    def test_every_no_step_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match="Got: 0.*1 and more"):
            qncd.Method(0)


def biased(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """What quantization might do: a tenth too strong, and each channel off by something of its own."""
    offset = np.array([0.05, -0.1, 0.02, 0.08], np.float32).reshape(-1, 1, 1)
    return (np.float32(1.1) * predict(feeds) + offset).astype(np.float32)


class TestPipeline:
    def made(self, folder: Path, **changes: Any) -> tuple[Fakes, Fakes]:
        return Fakes(folder / "float", **changes), Fakes(folder / "biased", function=biased, **changes)

    def exact(self, pipe: Any, **options: Any) -> Correction:
        deployment = pipe.deployment(**options)
        k, b = np.full(deployment.steps, 0.1), np.tile([0.05, -0.1, 0.02, 0.08], (deployment.steps, 1))
        return Correction("ptqd", {}, deployment, {"k": k, "b": b, "sigma": np.zeros(deployment.steps)}, {})

    @pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral", "dpmpp-2m", "lcm"])
    @pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
    def test_a_known_error_is_undone(self, tmp_path: Path, sampler: str, guidance_scale: float) -> None:
        ours, off = self.made(tmp_path)
        options: Any = {"num_inference_steps": 4, "sampler": sampler, "guidance_scale": guidance_scale, "seed": 3}
        expected = ours.pipe([PROMPT, "cat"], **options).latents
        plain = off.pipe([PROMPT, "cat"], **options).latents
        found = off.pipe(
            [PROMPT, "cat"],
            correction=self.exact(off.pipe, num_inference_steps=4, sampler=sampler, guidance_scale=guidance_scale),
            **options,
        ).latents
        assert np.abs(plain - expected).max() > 0.01
        # float32, up to 15 times by the first division by alpha, in numbers up to 30
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    def test_a_file_is_as_good_as_what_it_holds(self, tmp_path: Path) -> None:
        _, off = self.made(tmp_path)
        found = self.exact(off.pipe)
        found.save(tmp_path / "c.json")
        pictures = {off.pipe(PROMPT, correction=c).pixels.tobytes() for c in (found, tmp_path / "c.json", str(tmp_path / "c.json"))}
        assert len(pictures) == 1
        assert [s.latents.tobytes() for s in off.pipe.steps(PROMPT, correction=found)][-1] == off.pipe(
            PROMPT, correction=found
        ).latents.tobytes()

    def test_drift_moves_the_states_that_the_network_sees(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle")
        deployment = fakes.pipe.deployment()
        ones, zeros = np.ones((3, 4)), np.zeros((3, 4))
        found = Correction("tac-qdm", {}, deployment, {"K": ones, "drift": np.array([zeros[0], ones[0] * 2, zeros[0]])}, {})
        plain, moved = list(fakes.pipe.steps(PROMPT)), list(fakes.pipe.steps(PROMPT, correction=found))
        np.testing.assert_allclose(moved[0].latents, plain[0].latents + 2, rtol=1e-6)  # float32
        np.testing.assert_array_equal(fakes.denoise.calls[4]["sample"][:1], moved[0].latents)

    @pytest.mark.parametrize("seed", [7, [7, 8]])
    def test_same_seed_same_bits_and_the_same_first_noise(self, tmp_path: Path, seed: Any) -> None:
        fakes = Fakes(tmp_path / "bundle")
        deployment = fakes.pipe.deployment()
        rows = {k: np.full((3, 1), v) for k, v in {"mu_q": 0.0, "sigma_q": 1.0, "mu_d": 0.0, "sigma_d": 0.1, "rho": 0.0}.items()}
        found = Correction("d2-dpm", {"mode": "stochastic"}, deployment, rows, {})
        prompts = [PROMPT, "cat"]
        pictures = {fakes.pipe(prompts, correction=found, seed=seed, noise="philox").pixels.tobytes() for _ in range(2)}
        assert len(pictures) == 1
        assert fakes.pipe(prompts, seed=seed, noise="philox").pixels.tobytes() not in pictures
        firsts = [feeds["sample"].tobytes() for feeds in fakes.denoise.calls[::3]]
        assert len(set(firsts)) == 1

    def test_a_picture_does_not_depend_on_its_batch(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle")
        both = fakes.pipe([PROMPT, "cat"], seed=[3, 4], correction="qncd")
        alone = fakes.pipe("cat", seed=[4], correction="qncd")
        np.testing.assert_array_equal(both.pixels[1], alone.pixels[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_inference_steps": 4}, r"the steps 3, here 4.*--steps 4 "),
            ({"sampler": "euler"}, r"the sampler ddim, here euler.*--sampler euler "),
            ({"guidance_scale": 2.5}, r"guidance scale 5, here 2.5.*--guidance-scale 2.5 "),
        ],
    )
    def test_another_way_of_drawing_is_refused(self, tmp_path: Path, options: Any, message: str) -> None:
        _, off = self.made(tmp_path)
        found = self.exact(off.pipe)
        for call in (off.pipe, off.pipe.steps):
            with pytest.raises(ArgumentError, match=message):
                call(PROMPT, correction=found, **options)
        assert not off.denoise.calls

    def test_another_bundle_is_refused(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle")
        found = self.exact(fakes.pipe)
        for key, word in (("model", "the exported pipeline"), ("graph", "the denoiser's files"), ("state", "the quantization state")):
            other = replace(found, deployment=replace(found.deployment, **{key: "f" * 64}), name="c.json")
            with pytest.raises(ArgumentError, match=rf"'c.json' was measured for something else.*{word} ffffffffffff, here"):
                fakes.pipe(PROMPT, correction=other)

    def test_the_deployment_says_what_the_history_does(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle")
        fakes.pipe.bundle = replace(fakes.bundle, history=(Verb("export", {"source": "abc"}), Verb("quantize", {"state": "def"})))
        expected = Deployment("abc", graph_digest(fakes.bundle), "def", "ddim", 3, 5.0)
        assert fakes.pipe.deployment() == expected

    def test_predictor_is_the_guided_prediction(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle")
        found = {}

        class Keep(Corrector):
            def start(self, run: Run) -> Corrector:
                return self

            def prediction(self, output: np.ndarray, x: np.ndarray, i: int) -> None:
                found[i] = (x.copy(), output.copy())

        fakes.pipe([PROMPT, "cat"], correction=Keep())
        ask = fakes.pipe.predictor([PROMPT, "cat"])
        for i, (x, output) in found.items():
            np.testing.assert_array_equal(ask(x, i), output)


class TestFile:
    def test_golden_bytes(self, tmp_path: Path) -> None:
        found = Correction("ptqd", {}, HERE, {"k": np.zeros(3), "b": np.full((3, 1), 0.5), "sigma": np.ones(3)}, {"samples": 2})
        found.save(tmp_path / "c.json")
        stated = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
        assert stated == {
            "format": 1,
            "method": "ptqd",
            "options": {},
            "deployment": {
                "model": "m" * 64,
                "graph": "g" * 64,
                "state": "s" * 64,
                "sampler": "ddim",
                "steps": 3,
                "guidance_scale": 5.0,
            },
            "parameters": {"k": [0.0] * 3, "b": [[0.5]] * 3, "sigma": [1.0] * 3},
            "measurement": {"samples": 2},
            "sha256": "805dc98aed5a21101e99d08b4ec5554d16f93204dc1f73c73fa7078d8b9db378",
        }
        assert (tmp_path / "c.json").read_text(encoding="utf-8") == dump_json(stated)

    def test_an_existing_file_is_not_replaced(self, tmp_path: Path) -> None:
        correction().save(tmp_path / "c.json")
        with pytest.raises(OutputError, match="exists already"):
            correction().save(tmp_path / "c.json")

    def spoil(self, tmp_path: Path, change: Any, *, sign: bool = True) -> Path:
        """A file of a correction after ``change`` of its content, with a sha256 that fits if ``sign``."""
        file = tmp_path / "c.json"
        correction().save(file)
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        if sign:
            del content["sha256"]
            content["sha256"] = hashlib.sha256(dump_json(content).encode()).hexdigest()
        file.write_text(dump_json(content), encoding="utf-8")
        return file

    @pytest.mark.parametrize(
        ("change", "sign", "message"),
        [
            (lambda c: c.update(method="x"), False, "was changed after it was written"),
            (lambda c: c.update(format=2), True, r"of this version. Got: format 2. Allowed: format 1"),
            (lambda c: c.update(method="ptdq"), True, r"No correction is called 'ptdq'.*Did you mean 'ptqd'"),
            (lambda c: c.update(method="qncd"), True, "finds out while it draws"),
            (lambda c: c.update(options={"mode": "x"}), True, r"'ptqd' has no option mode. Allowed: none"),
            (lambda c: c.pop("parameters"), True, "lacks or misstates a field: 'parameters'"),
            (lambda c: c["parameters"].pop("k"), True, "lacks or misstates a field: 'k'"),
            (lambda c: c["parameters"].update(k=["a"]), True, "lacks or misstates a field"),
            (lambda c: c["parameters"].update(k=[0.0], b=[[0.0]], sigma=[1.0]), True, "not those of 3 steps"),
            (lambda c: c["parameters"].update(k=[math.nan] * 3), True, "not a finite number"),
            (lambda c: c["deployment"].update(colour="red"), True, "lacks or misstates a field"),
        ],
    )
    def test_damaged_content_is_refused(self, tmp_path: Path, change: Any, sign: bool, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            Correction.load(self.spoil(tmp_path, change, sign=sign))

    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b""])
    def test_other_files_are_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "c.json").write_bytes(content)
        with pytest.raises(ArgumentError, match="is no correction"):
            Correction.load(tmp_path / "c.json")

    def test_no_file_and_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match=r"There is no correction 'nope'. Allowed: a file that.*, or qncd"):
            resolve("nope")
        with pytest.raises(ArgumentError, match="is no correction"):
            resolve(tmp_path)

    def test_a_method_that_must_be_measured_is_no_correction_by_itself(self) -> None:
        with pytest.raises(ArgumentError, match=r"'ptqd' must be measured first. Measure it.*edgediffusion correct"):
            resolve("ptqd")
        assert resolve("qncd") == qncd.Method()

    @pytest.mark.parametrize("options", [{"mode": "both"}, {"granularity": "pixel"}])
    def test_unknown_values_of_options(self, options: Any) -> None:
        with pytest.raises(ArgumentError, match=r"d2-dpm has no such .*Allowed: \w+, \w+"):
            measured("d2-dpm", options)

    def test_an_unknown_method(self) -> None:
        with pytest.raises(UnknownName, match="d2-dpm, ptqd, qncd, tac-qdm"):
            measured("d3-dpm", {})
