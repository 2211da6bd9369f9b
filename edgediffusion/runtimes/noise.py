"""Where the noise of a picture comes from: a seed gives the same numbers on every run and every machine.

``TorchNoise`` gives the numbers that ``torch.randn(shape, generator=torch.Generator().manual_seed(seed))`` gives on a
CPU, so that a picture can be compared one to one with diffusers'. ``PhiloxNoise`` is counter-based and uses all 64 bits
of a seed, of which torch's CPU generator uses 32. Both do their transcendental functions in float64 and round at the
end: the float32 ones of NumPy differ in the last bit from one instruction set to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from edgediffusion.errors import ArgumentError, UnknownName

TWO_PI = np.float32(2 * math.pi)
GROUP = 16  # ATen fills 16 numbers at a time, eight from a cosine and eight from a sine


class Noise(Protocol):
    """A stream of independent standard normal numbers; every call continues it."""

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """float32 array of ``shape``."""
        ...


class TorchNoise:
    """torch's CPU generator: mt19937 seeded with the low 32 bits, then ATen's ``normal_fill``.

    Source: ATen/native/cpu/DistributionTemplates.h and ATen/core/DistributionsHelper.h (PyTorch 2.13). ``dtype`` is
    that of the torch tensor: halves are computed in float32 and rounded, but take fewer numbers off the stream when
    the size is no multiple of 16.
    """

    def __init__(self, seed: int, dtype: str = "float32"):
        self._bits = np.random.MT19937()
        state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = state
        self._dtype = np.dtype(dtype)
        self._spare: float | None = None  # the second number of the last small draw

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        size = math.prod(shape)
        values = self._large(size) if size >= GROUP else self._small(size)
        return values.astype(self._dtype).astype(np.float32).reshape(tuple(shape))

    def _large(self, size: int) -> np.ndarray:
        """``normal_fill``: whole groups in place; a last group, drawn anew, overlaps what the others did not cover."""
        whole = size - size % GROUP
        uniforms = self._uniform24(size if self._dtype == np.float32 else whole)
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller_groups(uniforms[:whole])
        if whole != size:
            values[-GROUP:] = _box_muller_groups(self._uniform24(GROUP))
        return values

    def _small(self, size: int) -> np.ndarray:
        """Below 16 numbers ATen takes them one by one from a float64 Box-Muller pair, and keeps a spare for later."""
        values = np.empty(size, np.float64)
        for i in range(size):
            if self._spare is not None:
                values[i], self._spare = self._spare, None
            else:
                u1, u2 = self._uniform53(), self._uniform53()
                radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
                values[i], self._spare = radius * math.cos(theta), radius * math.sin(theta)
        return values

    def _uniform24(self, size: int) -> np.ndarray:
        raw = self._bits.random_raw(size) & np.uint64(0xFFFFFF)
        return raw.astype(np.float32) * np.float32(2.0**-24)

    def _uniform53(self) -> float:
        high, low = (int(v) for v in self._bits.random_raw(2))
        return float(((high << 32 | low) & (2**53 - 1)) * 2.0**-53)


class PhiloxNoise:
    """Philox4x64-10 keyed with the whole seed (Salmon et al. 2011), float64 Box-Muller, rounded to float32."""

    def __init__(self, seed: int, dtype: str = "float32"):
        self._bits = np.random.Philox(key=seed & (2**64 - 1))
        self._dtype = np.dtype(dtype)

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        size = math.prod(shape)
        pairs = -(-size // 2)
        uniforms = (self._bits.random_raw(2 * pairs) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        radius, theta = np.sqrt(-2.0 * np.log1p(-uniforms[:pairs])), 2.0 * np.pi * uniforms[pairs:]
        values = np.concatenate([radius * np.cos(theta), radius * np.sin(theta)])[:size]
        return values.astype(self._dtype).astype(np.float32).reshape(tuple(shape))


class PerImage:
    """One stream per image, so that an image does not depend on what else is in its batch."""

    def __init__(self, sources: Sequence[Noise]):
        self._sources = tuple(sources)

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        return np.concatenate([source.normal((1, *shape[1:])) for source in self._sources])


FLAVOURS: Mapping[str, Callable[[int, str], Noise]] = MappingProxyType({"torch": TorchNoise, "philox": PhiloxNoise})


def source(seed: int | Sequence[int], images: int, *, flavour: str = "torch", dtype: str = "float32") -> Noise:
    """The noise of ``images`` images: one stream for all (as diffusers with one generator), or one per image.

    Raises:
        UnknownName: no such flavour. ArgumentError: the number of seeds is not that of the images.
    """
    if flavour not in FLAVOURS:
        raise UnknownName("noise", flavour, FLAVOURS)
    make = FLAVOURS[flavour]
    if isinstance(seed, int):
        return make(seed, dtype)
    if len(seed) != images:
        raise ArgumentError("A list of seeds has one per image", got=f"{len(seed)} seeds for {images} images")
    return PerImage([make(int(s), dtype) for s in seed])


def _box_muller_groups(uniforms: np.ndarray) -> np.ndarray:
    """ATen's ``NormalFill16``: in each group of 16, numbers j and j + 8 make a pair. float32 [16 k] -> float32 [16 k].

    The angle is rounded to float32 before its cosine is taken, as ATen does: that rounding is visible in the result.
    """
    first, second = uniforms.reshape(-1, 2, GROUP // 2).transpose(1, 0, 2)
    logarithm = np.log((np.float32(1) - first).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * logarithm).astype(np.float64)
    theta = (TWO_PI * second).astype(np.float64)
    pairs = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    return pairs.astype(np.float32).reshape(-1)
