"""Four-bit floating formats in NumPy: golden values, and NVFP4 against nvidia-modelopt to the bit."""

import ml_dtypes
import numpy as np
import pytest

from edgediffusion.optimize.float4 import (
    BLOCK,
    MAGNITUDES,
    candidates,
    choose_weight_format,
    nvfp4_block_scales,
    nvfp4_tensor_scale,
    nvfp4_values,
    read_float4,
    round_to,
)


@pytest.mark.parametrize(
    ("form", "given", "expected"),
    [
        # Each midpoint goes to the value of the even code; beyond the largest is the largest.
        ("e2m1", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0], [0, 1, 1, 2, 2, 4, 4, 6]),
        ("e1m2", [0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625, 9.0], [0, 0.5, 0.5, 1, 1, 1.5, 1.5, 1.75]),
        ("e3m0", [0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0, 17.0], [0, 0.5, 0.5, 2, 2, 8, 8, 16]),
        ("e2m1", [0.2500001, 4.9999995, 5.0000005], [0.5, 4, 6]),
    ],
)
def test_rounding_is_to_nearest_and_half_to_the_even_code(form, given, expected):
    x = np.array(given, np.float32)
    np.testing.assert_array_equal(round_to(x, form), np.array(expected, np.float32))
    np.testing.assert_array_equal(round_to(-x, form), -np.array(expected, np.float32))


@pytest.mark.parametrize("form", MAGNITUDES)
def test_values_of_a_format_are_kept(form):
    values = np.array(MAGNITUDES[form])
    np.testing.assert_array_equal(round_to(values, form), values)
    np.testing.assert_array_equal(read_float4(-values, values[-1], form), -values)


def test_e2m1_is_what_ml_dtypes_rounds_to_and_e1m2_is_int4():
    x = np.linspace(-8, 8, 80_001, dtype=np.float32)
    np.testing.assert_array_equal(round_to(x, "e2m1"), x.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    np.testing.assert_array_equal(round_to(x, "e1m2"), np.clip(np.rint(x * 4), -7, 7) / 4)


def test_nvfp4_of_one_block_by_hand():
    weight = np.zeros((1, 32), np.float32)
    weight[0, :4] = [6, -3, 0.25, 1.3]
    weight[0, 16:18] = [0.06, 0.01]
    scale = nvfp4_tensor_scale(6.0)
    assert scale == np.float32(6 / 2688)
    blocks = nvfp4_block_scales(weight, scale)
    # 6 / (6 s) = 448; 0.06 / (6 s) = 4.48, which E4M3 rounds to 4.5.
    np.testing.assert_array_equal(blocks.astype(np.float32), [[448, 4.5]])
    values = nvfp4_values(weight, blocks, scale)
    np.testing.assert_array_equal(values[0, :4], [6, -3, 0, 1.5])
    # Steps of 4.5 s = 0.01004: 0.06 is 5.97 of them, 0.01 is 0.996.
    np.testing.assert_array_equal(values[0, 16:18], [6, 1])


@pytest.mark.parametrize("spread", [0.0, 3.0], ids=["even rows", "rows of all sizes"])
def test_nvfp4_is_modelopts_to_the_bit(spread):
    torch = pytest.importorskip("torch")
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((48, 96)) * np.exp(spread * rng.standard_normal((48, 1)))).astype(np.float32)
    weight[0, :BLOCK] = 0
    weight[1] *= 1e-6  # its blocks' scales are the smallest of E4M3
    stored, blocks, tensor = qtensor.NVFP4QTensor.quantize(torch.from_numpy(weight.copy()), BLOCK)
    read = stored.dequantize(dtype=torch.float32, scale=blocks, double_scale=tensor, block_sizes={-1: BLOCK}).numpy()
    scale = nvfp4_tensor_scale(np.abs(weight).max())
    ours = nvfp4_block_scales(weight, scale)
    assert scale == tensor.item()
    np.testing.assert_array_equal(ours.view(np.uint8), blocks.view(torch.uint8).numpy())
    steps = (ours.astype(np.float32) * scale)[..., None]
    np.testing.assert_array_equal((nvfp4_values(weight, ours, scale).reshape(48, -1, BLOCK) * steps).reshape(48, 96), read)


def test_a_tensor_of_zeros_is_read_as_zeros():
    scale = nvfp4_tensor_scale(0.0)
    zeros = np.zeros((2, 32), np.float32)
    assert not nvfp4_values(zeros, nvfp4_block_scales(zeros, scale), scale).any()
    assert not read_float4(zeros, 0.0, "e3m0").any()


@pytest.mark.parametrize(
    ("data", "best"),
    [
        (np.random.default_rng(0).uniform(-1, 1, (4, 512)), "e1m2"),  # even: equal steps
        (np.random.default_rng(0).standard_normal((4, 512)), "e2m1"),
        (np.exp(2 * np.random.default_rng(0).standard_normal((4, 512))), "e3m0"),  # over orders of magnitude
    ],
    ids=["uniform", "normal", "log-normal"],
)
def test_the_format_follows_the_data(data, best):
    form, amax = choose_weight_format(data, np.ones(1), candidates("fp4"), search=False)
    assert form == best
    np.testing.assert_allclose(amax, np.abs(data).max(1), rtol=1e-6)


def test_searching_for_the_scale_never_adds_error_and_cares_for_importance():
    weight = np.random.default_rng(1).standard_normal((8, 256)).astype(np.float32)
    weight[:, 0] = 8

    def error(search, importance):
        form, amax = choose_weight_format(weight, importance, candidates("e2m1"), search=search)
        return (importance * (weight - read_float4(weight, amax[:, None], form)) ** 2).sum()

    assert error(True, np.ones((1, 256))) < error(False, np.ones((1, 256)))
    unimportant = np.ones((1, 256))
    unimportant[0, 0] = 1e-6
    assert error(True, unimportant) < 0.5 * error(False, unimportant)


def test_activations_in_torch_are_read_as_in_numpy():
    torch = pytest.importorskip("torch")
    from edgediffusion.optimize.float4_inputs import read_tensor

    x = np.random.default_rng(2).standard_normal(4096).astype(np.float32) * 3
    for form in MAGNITUDES:
        found = read_tensor(torch.from_numpy(x), 0.37, form).numpy()
        np.testing.assert_array_equal(found, round_to(x / np.float32(0.37), form) * np.float32(0.37))
