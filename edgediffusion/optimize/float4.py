"""Four-bit floating point: the values of each format, rounding to them, and the scales they are used with.

A format of e exponent and m mantissa bits, e + m = 3, has a sign and the eight magnitudes of ``MAGNITUDES``, by their codes 0..7; there
is no infinity and no NaN. Exponents have the bias 2^(e-1) - 1, or 1 where e is 1; scales make up for any other.

* E2M1 is what NVIDIA's Blackwell multiplies (OCP Microscaling Formats 1.0, section 5.3.3).
* E1M2 has equal steps throughout: it is the grid of symmetric int4.
* E3M0 has powers of two alone.

**One scale** for an output channel, or for a tensor of activations: amax / the largest magnitude. HQ-DiT (Liu and Zhang 2024, 2405.19751)
chooses the format for each layer from the range of its data. Its formula could not be verified; here it is the format with the least
squared error, which is ours.

**NVFP4**: E2M1 in blocks of 16 along the input channels. Each block has a scale in E4M3, each tensor one in float32:

    s = amax / (6 * 448)        b = e4m3(amax of the block / (6 s)), in [2^-9, 448]        q = e2m1(x / (b s))

as in nvidia-modelopt 0.47 (``NVFP4QTensor``), to the bit. The blocks of activations find theirs at run time.
"""

from __future__ import annotations

import numpy as np

from edgediffusion.optimize.integers import E4M3_MAX, SMALLEST

MAGNITUDES: dict[str, tuple[float, ...]] = {
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "e1m2": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    "e3m0": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
BLOCK = 16
E2M1_MAX = MAGNITUDES["e2m1"][-1]
SMALLEST_E4M3 = 2.0**-9
CLIPS = tuple(1 - 0.02 * i for i in range(40))  # of the largest value, as in integers.best_weight_amax


def candidates(form: str) -> tuple[str, ...]:
    """The formats that a recipe's one may be: all for ``fp4``."""
    return tuple(MAGNITUDES) if form == "fp4" else (form,)


def round_to(x: np.ndarray, form: str) -> np.ndarray:
    """The nearest values of a format, of two equally near that of the even code; beyond the largest, the largest."""
    values = np.asarray(MAGNITUDES[form], x.dtype)
    between = (values[1:] + values[:-1]) / 2
    size = np.abs(x)
    codes = np.searchsorted(between, size, side="left")
    tied = (codes < len(between)) & (size == between[np.minimum(codes, len(between) - 1)]) & (codes % 2 == 1)
    return np.asarray(np.copysign(values[codes + tied], x))


def float4_scale(amax: np.ndarray | float, form: str) -> np.ndarray:
    """float32 scales: amax / the largest magnitude."""
    return np.asarray(np.maximum(np.float32(amax), np.float32(SMALLEST)) / np.float32(MAGNITUDES[form][-1]))


def read_float4(x: np.ndarray, amax: np.ndarray | float, form: str) -> np.ndarray:
    """What is read back of ``x``, whose values are cut at ``amax``, which is broadcast to it."""
    scale = float4_scale(amax, form)
    return np.asarray(round_to(x / scale, form) * scale)


def choose_weight_format(weight: np.ndarray, importance: np.ndarray, forms: tuple[str, ...], *, search: bool) -> tuple[str, np.ndarray]:
    """The format with the least error over the weights [out, in, ...] of a layer, and the amax [out] that it is used with.

    The error is sum_i importance_i (w_i - read(w_i))^2, with ``importance`` broadcast to ``weight``. amax is each channel's largest value,
    or with ``search`` that times 1, 0.98, 0.96, ..., whichever has the least error in the format.
    """
    flat = weight.reshape(len(weight), -1).astype(np.float32)
    counts = np.broadcast_to(importance, weight.shape).reshape(flat.shape)
    largest = np.maximum(np.abs(flat).max(1), SMALLEST)
    found: dict[str, tuple[float, np.ndarray]] = {}
    for form in forms:
        amax = np.outer(CLIPS if search else (1.0,), largest).astype(np.float32)
        errors = np.stack([(counts * (flat - read_float4(flat, row[:, None], form)) ** 2).sum(1) for row in amax])
        best = errors.argmin(0)
        channels = np.arange(len(flat))
        found[form] = float(errors[best, channels].sum()), amax[best, channels]
    form = min(found, key=lambda name: found[name][0])
    return form, found[form][1]


def nvfp4_tensor_scale(amax: float) -> np.float32:
    """s of a tensor: amax / (6 * 448); 1 for a tensor of zeros."""
    return np.float32(amax) / np.float32(E2M1_MAX * E4M3_MAX) if amax else np.float32(1)


def nvfp4_block_scales(weight: np.ndarray, tensor_scale: np.float32) -> np.ndarray:
    """b [out, in / 16] of a weight [out, in], as E4M3."""
    import ml_dtypes  # comes with the extra "optimize", and calibrating begins before that is asked for

    amax = np.abs(weight.reshape(len(weight), -1, BLOCK)).max(2).astype(np.float32)
    wanted = amax / (np.float32(E2M1_MAX) * tensor_scale)
    wanted[wanted == 0] = 1  # ModelOpt's, for blocks of zeros
    return np.asarray(np.clip(wanted, SMALLEST_E4M3, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn))


def nvfp4_values(weight: np.ndarray, scales: np.ndarray, tensor_scale: np.float32) -> np.ndarray:
    """q [out, in] of a weight [out, in], as numbers: codes times b s are what is read back."""
    blocks = weight.reshape(len(weight), -1, BLOCK).astype(np.float32)
    steps = scales.astype(np.float32) * tensor_scale
    return round_to(blocks / steps[..., None], "e2m1").reshape(weight.shape)


def read_nvfp4(weight: np.ndarray) -> np.ndarray:
    """What is read back of a weight [out, in]."""
    scale = nvfp4_tensor_scale(float(np.abs(weight).max()))
    blocks = nvfp4_block_scales(weight, scale)
    steps = np.repeat(blocks.astype(np.float32) * scale, BLOCK, 1)
    return np.asarray(nvfp4_values(weight, blocks, scale) * steps)
