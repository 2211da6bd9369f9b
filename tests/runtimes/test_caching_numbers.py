"""Caching policies against published numbers and against diffusers' own state machines; no graph is run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes import caching
from edgediffusion.runtimes.caching import adaptive_diffusion, deepcache, magcache, taylorseer, teacache
from edgediffusion.runtimes.caching._change import relative_change

# T, N, c, p of DeepCache's non-uniform schedule; what the authors' code gives, and the signed power.
TABLE = [
    (50, 5, 15, 1.4, "0 5 9 13 17 21 26 31 37 43", "0 6 11 14 15 19 24 29 35 42"),
    (50, 5, 10, 1.2, "0 5 9 12 16 21 26 32 38 43", "0 5 9 11 16 21 26 31 37 43"),
    (50, 5, 10, 1.4, "0 4 8 11 15 20 25 30 36 43", "0 5 9 10 13 17 23 29 35 42"),
    (50, 5, 20, 1.2, "0 6 11 15 20 23 28 33 38 44", "0 6 11 16 20 22 27 32 38 43"),
    (50, 10, 15, 1.4, "0 9 17 26 37", "0 11 15 24 35"),
    (50, 10, 10, 1.2, "0 9 16 26 38", "0 9 16 26 37"),
    (50, 3, 15, 1.4, "0 3 6 8 11 13 15 17 20 22 25 28 32 35 38 42 46", "0 4 7 10 12 14 15 16 18 20 23 26 29 33 37 41 45"),
    (50, 2, 15, 1.4, "0 2 4 6 7 9 11 12 14 15 17 18 20 22 24 26 28 30 32 35 37 39 42 44 47", None),
    (20, 2, 6, 1.4, "0 2 4 6 7 8 10 12 15 17", "0 3 5 6 7 8 10 12 15 17"),
    (20, 3, 6, 1.4, "0 3 5 7 10 13 16", "0 4 6 7 9 12 16"),
    (
        250,
        10,
        120,
        1.2,
        "0 12 22 33 44 54 64 74 83 93 102 111 120 128 137 146 155 165 175 185 195 206 216 227 238",
        "0 12 24 35 46 57 68 78 88 97 106 114 120 125 133 141 151 160 170 181 192 203 214 226 238",
    ),
]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


class TestDeepCache:
    @pytest.mark.parametrize(("calls", "interval", "center", "power", "reference", "signed"), TABLE)
    def test_non_uniform(self, calls: int, interval: int, center: int, power: float, reference: str, signed: str | None) -> None:
        for flavour, expected in (("reference", reference), ("signed", signed)):
            policy = deepcache.Policy(interval, schedule="non-uniform", center=center, power=power, flavour=flavour)
            full = policy.full_calls(calls)
            assert len(full) == math.ceil(calls / interval)
            assert expected is None or full == numbers(expected)

    def test_a_power_that_has_to_be_lowered(self) -> None:
        """50, 2, 15, 1.4 by the signed power: the published list is cut in the middle."""
        full = deepcache.Policy(2, schedule="non-uniform", flavour="signed").full_calls(50)
        assert full[:14] == numbers("0 3 5 7 9 11 12 14 15 16 17 19 21 23")
        assert full[-1] == 47

    def test_center_less(self) -> None:
        def full(calls: int, interval: int) -> tuple[int, ...]:
            return deepcache.Policy(interval, schedule="center-less", power=1.5).full_calls(calls)

        assert full(50, 5) == numbers("0 1 4 8 12 17 23 29 35 42")
        assert (len(full(250, 5)), len(full(250, 2))) == (49, 120)  # fewer than the 50 and 125 that were asked for

    @pytest.mark.parametrize("calls", [1, 2, 7, 50])
    @pytest.mark.parametrize("interval", [1, 2, 5, 9])
    def test_uniform(self, calls: int, interval: int) -> None:
        full = deepcache.Policy(interval).full_calls(calls)
        assert full == tuple(range(0, calls, interval))
        assert len(full) == math.ceil(calls / interval)

    def test_published_operations(self) -> None:
        """LDM-4-G, 250 steps, G multiplications a step: (k C_full + (T - k) C_shallow) / T; the paper's table."""
        for interval, published in ((2, 52.12), (3, 36.48), (5, 23.50), (10, 13.97), (20, 9.39)):
            k = len(deepcache.Policy(interval).full_calls(250))
            assert (k * 99.82 + (250 - k) * 4.425) / 250 == pytest.approx(published, abs=0.012)

    def test_a_schedule_that_does_not_exist(self) -> None:
        with pytest.raises(ArgumentError, match=r"no 10 full calls of 10 around the center 5.*schedule=uniform"):
            deepcache.Policy(1, schedule="non-uniform", center=5, power=1.2).full_calls(10)


class TestTaylorSeer:
    @staticmethod
    def forecast(form: str, order: int, anchors: dict[int, float], at: int) -> float:
        state = taylorseer.Forecast(order, taylorseer._newton if form == "newton" else taylorseer._taylor)
        for number, value in anchors.items():
            state.add(number, np.array([value], np.float32))
        return float(state.at(at)[0])

    def test_golden_values_on_a_quadratic(self) -> None:
        anchors = {s: 2 + 3 * s - 0.5 * s * s for s in (0, 3, 6)}
        assert [self.forecast("taylor", 1, anchors, s) for s in (7, 8)] == [0.5, -1.0]
        assert [self.forecast("taylor", 2, anchors, s) for s in (7, 8)] == [0.0, -3.0]
        assert [self.forecast("newton", 2, anchors, s) for s in (7, 8)] == [-1.5, -6.0]

    @pytest.mark.parametrize("form", taylorseer.FORMS)
    def test_order_one_is_exact_on_lines(self, form: str) -> None:
        anchors = {s: 2 - 0.75 * s for s in (0, 1, 2, 4)}
        assert self.forecast(form, 1, anchors, 7) == pytest.approx(2 - 0.75 * 7, abs=1e-6)

    @pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
    def test_newtons_form_is_exact_on_polynomials_of_its_order(self, order: int) -> None:
        polynomial = np.polynomial.Polynomial([0.5, -1.0, 0.25, 0.1, -0.05][: order + 1])
        anchors = {s: float(polynomial(s)) for s in (0, 1, 2, 4, 7)}
        assert self.forecast("newton", order, anchors, 9) == pytest.approx(float(polynomial(9)), rel=1e-4)

    @pytest.mark.parametrize("order", [0, 1, 2, 3])
    def test_equals_diffusers(self, order: int) -> None:
        torch = pytest.importorskip("torch")
        from diffusers.hooks.taylorseer_cache import TaylorSeerState

        policy = taylorseer.Policy(interval=4, order=order)
        theirs, ours = TaylorSeerState(torch.float32, order), taylorseer.Forecast(order, taylorseer._taylor)
        features = np.random.default_rng(0).standard_normal((20, 2, 3, 4)).astype(np.float32)
        for number, feature in enumerate(features):
            theirs.current_step = number
            if policy.computes(number):
                theirs.update((torch.from_numpy(feature),))
                ours.add(number, feature)
            else:
                np.testing.assert_allclose(ours.at(number), theirs.predict()[0].numpy(), atol=1e-5, rtol=1e-5)


class TestTeaCache:
    def test_the_polynomial_of_flux(self) -> None:
        expected = {0.0: 0.264231, 0.05: 0.180503, 0.1: 0.206847, 0.2: 0.261995}
        policy = teacache.Policy(polynomial="flux")
        for change, value in expected.items():
            assert policy.expected(change) == pytest.approx(value, abs=1e-6)

    def test_coefficients_as_text(self) -> None:
        assert teacache.Policy(polynomial="2/-1.5e-1/0.25").expected(0.5) == 2 * 0.25 - 0.15 * 0.5 + 0.25
        assert teacache.Policy().expected(0.125) == 0.125
        assert teacache.Policy(polynomial="-1/0").expected(0.5) == 0  # a fit below zero


class TestMagCache:
    @pytest.mark.parametrize(("threshold", "most", "retention"), [(0.06, 3, 0.2), (0.2, 5, 0.1), (0.02, 1, 0.0)])
    @pytest.mark.parametrize("calls", [28, 20, 50])
    def test_equals_diffusers(self, calls: int, threshold: float, most: int, retention: float) -> None:
        pytest.importorskip("torch")
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheConfig, MagCacheHeadHook, MagCacheState

        config = MagCacheConfig(threshold, most, retention, calls, FLUX_MAG_RATIOS)
        state = MagCacheState()
        hook: Any = MagCacheHeadHook(SimpleNamespace(_context="here", get_state=lambda: state), config)
        hook._metadata = SimpleNamespace(
            hidden_states_argument_name="x",
            _get_parameter_from_args_kwargs=lambda name, args, kwargs: args[0],
            return_encoder_hidden_states_index=None,
        )
        hook.fn_ref = SimpleNamespace(original_forward=lambda x: x)
        computed = []
        import torch

        for number in range(calls):
            hook.new_forward(None, torch.zeros(1))
            if state.should_compute:
                computed.append(number)
                state.previous_residual = torch.zeros(1)
            state.step_index += 1
        text = "/".join(f"{ratio:.8g}" for ratio in FLUX_MAG_RATIOS.tolist())
        ours = caching.resolve(f"magcache:threshold={threshold},most={most},retention={retention},ratios={text}")
        assert isinstance(ours, magcache.Policy)
        assert list(ours.full_calls(calls)) == computed

    def test_the_nearest_ratio_of_another_number_of_calls(self) -> None:
        assert magcache.nearest((1.0, 2.0, 3.0), 5) == (1.0, 1.0, 2.0, 3.0, 3.0)  # half goes to the even one, as in diffusers
        assert magcache.nearest((1.0, 2.0, 3.0), 1) == (3.0,)


class TestMeasures:
    def test_relative_change(self) -> None:
        before = np.array([[1.0, -3.0]], np.float16)
        assert relative_change(np.array([[1.5, -2.0]], np.float16), before) == 0.375
        assert relative_change(before, np.zeros_like(before)) == math.inf

    def test_a_parabola_has_no_third_difference(self) -> None:
        x3, x2, x1, x = (np.full((1, 4), 1 + 0.5 * s + 0.25 * s * s, np.float32) for s in range(4))
        assert adaptive_diffusion.third_difference(x, x1, x2, x3) == 0
        assert adaptive_diffusion.third_difference(x + 1, x1, x2, x3) == pytest.approx(2 / np.linalg.norm(x + 1))
        assert adaptive_diffusion.third_difference(np.zeros(2), *np.ones((3, 2))) == math.inf
