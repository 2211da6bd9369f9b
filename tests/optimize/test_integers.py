import numpy as np
import pytest

from edgediffusion.optimize.integers import affine, best_weight_amax, channel_affine, weight_codes, weight_scale


def test_asymmetric_golden_values():
    q = affine(-1.0, 2.0, 8, signed=False)  # METHODS 2.1: delta 0.01176471, z = 85, q = [0, 127, 255]
    assert q.scale == pytest.approx(0.01176471, rel=1e-6)
    assert q.zero == 85
    np.testing.assert_allclose(q(np.array([-1.0, 0.5, 2.0])) / q.scale + q.zero, [0, 127, 255], atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (-3.0, -1.0), (-1e-3, 7.0), (0.0, 0.0)])
def test_zero_is_exact_and_codes_fit(low, high, bits):
    for signed in (False, True):
        q = affine(low, high, bits, signed=signed)
        assert q(np.zeros(1)) == 0
        assert q.lowest <= q.zero <= q.highest
        assert q.scale > 0


def test_a_symmetric_quantizer_has_no_zero_point():
    q = affine(-1.0, 2.0, 8, signed=True)
    assert (q.zero, q.lowest, q.highest) == (0, -127, 127)
    assert q.scale == pytest.approx(2 / 127)


def test_channels_are_as_the_scalar_formula_has_them():
    low, high = np.array([-1.0, 0.5, -3.0]), np.array([2.0, 1.0, -1.0])
    scale, zero = channel_affine(low, high, 8)
    for i in range(3):
        one = affine(low[i], high[i], 8, signed=False)
        assert (one.scale, one.zero) == (scale[i], zero[i])


def test_weight_codes_round_half_to_even():
    scale = weight_scale(np.array([1.0]), 8)
    assert scale[0] == np.float32(1 / 127)
    assert weight_codes(np.array([[-1.0, 0.5, 1.0]]), scale, 8).tolist() == [[-127, 64, 127]]  # 63.5 steps


def test_the_best_amax_is_never_worse_than_the_largest_value_and_better_for_an_outlier():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 256)).astype(np.float32)
    weight[0, 0] = 6

    def error(amax):
        scale = weight_scale(amax, 4)
        return ((weight - weight_codes(weight, scale, 4) * scale[:, None]) ** 2).sum(1)

    largest = np.abs(weight).max(1)
    best = best_weight_amax(weight, np.ones((1, 256)), 4)
    assert (error(best) <= error(largest) * 1.0001).all()
    assert error(best)[0] < 0.8 * error(largest)[0]


def test_the_best_amax_cares_for_important_weights():
    weight = np.array([[1.0, 0.1]], np.float32)
    small = best_weight_amax(weight, np.array([[0.0, 1.0]]), 4)
    assert small[0] < 0.8
