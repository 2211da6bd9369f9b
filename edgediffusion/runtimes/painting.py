"""Starting from a picture: image to image, and inpainting, which keeps a part of it. As diffusers' pipelines of these names do.

Two kinds of networks fill in a masked part. One that was trained for it sees the mask and the latents of what is left of the
picture as further channels of its input. Any other one is led: after each step the part to keep is put back, with as much
noise as belongs there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.autoencoder import Gaussian
from edgediffusion.runtimes.images import pictures, size, to_input, to_mask
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.schedules import Point, Points

STRENGTH, INPAINTING_STRENGTH = 0.8, 1.0  # diffusers' defaults


@dataclass(frozen=True)
class Painting:
    """What is painted over: pictures, and masks for them where a part is kept. 0 < ``strength`` <= 1 says how far it may go."""

    pictures: tuple[Any, ...]
    masks: tuple[Any, ...]
    strength: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures as they were given."""
        return size(self.pictures[0])

    @property
    def from_noise(self) -> bool:
        """Whether nothing of the picture is in the start: diffusers' inpainting at full strength."""
        return bool(self.masks) and self.strength == 1.0

    def skipped(self, steps: int, *, is_flow: bool) -> int:
        """How many of the first steps are left out.

        Raises:
            ArgumentError: all of them.
        """
        # Stable Diffusion's pipelines round the steps down and Stable Diffusion 3's those that are left out.
        skipped = int(max(steps - steps * self.strength, 0)) if is_flow else steps - int(steps * self.strength)
        if skipped >= steps:
            raise ArgumentError(
                f"At strength {self.strength:g} no step of {steps} is left", allowed="more steps, or a strength nearer to 1"
            )
        return skipped


def painting(image: Any, mask_image: Any, strength: float | None) -> Painting | None:
    """What a request says about pictures; None if it names none.

    Raises:
        ArgumentError: something that is no picture, a mask alone or of another size, a strength out of range.
    """
    if image is None:
        if mask_image is not None:
            raise ArgumentError("A mask needs the picture that it belongs to", do="Give image as well.")
        return None
    strength = strength if strength is not None else STRENGTH if mask_image is None else INPAINTING_STRENGTH
    if not 0 < strength <= 1:
        raise ArgumentError("The strength cannot be used", got=strength, allowed="above 0, which keeps the picture, to 1")
    found = Painting(pictures(image), () if mask_image is None else pictures(mask_image), float(strength))
    for what, others in (("Pictures", found.pictures), ("A mask and its picture", found.masks)):
        for other in others:
            if size(other) != found.size:
                told = " and ".join(" x ".join(map(str, s)) for s in (size(other), found.size))
                raise ArgumentError(f"{what} have different sizes", got=f"{told} (height x width)")
    return found


@dataclass(frozen=True)
class Keep:
    """The part of a picture that is put back after each step. ``mask`` is 1 where it is not; all are [images, ...]."""

    latents: np.ndarray
    noise: np.ndarray
    mask: np.ndarray

    def __call__(self, x: np.ndarray, at: Point) -> None:
        """Put it into a state that lies at a point, in place."""
        x[...] = (1 - self.mask) * (at.alpha * self.latents + at.sigma * self.noise) + self.mask * x


@dataclass(frozen=True)
class Start:
    """The state that the loop begins with, further channels of the network's input, and what it puts back after each step."""

    x: np.ndarray
    beside: np.ndarray | None = None
    keep: Keep | None = None


@dataclass(frozen=True)
class Canvas:
    """The latents to paint in: their ``shape``, [images, c, h, w], the noise that they are given, and how pictures become them.

    ``channels`` and ``encode`` are those of an autoencoder. ``per_image`` says that ``noise`` has a stream for each image.
    """

    shape: tuple[int, ...]
    downsampling: int
    channels: int
    encode: Callable[[np.ndarray], Gaussian]
    noise: Noise
    per_image: bool

    def begin(self, painted: Painting, points: Points, first: Callable[[], np.ndarray], *, beside: bool) -> Start:
        """Start from a picture. ``first`` draws the first noise. Numbers are drawn in the order in which diffusers draws them.

        ``beside`` is whether the network takes the mask, and the latents of what it leaves, as further channels.

        Raises:
            ArgumentError: pictures that do not fit. EngineError: they cannot be encoded.
        """
        height, width = (size * self.downsampling for size in self.shape[2:])
        pixels = to_input(painted.pictures, self.channels, height, width)
        latents = None if beside and painted.from_noise else self._latents(pixels)
        noise = first()
        at = points.at[0]
        x = points.start(noise) if painted.from_noise or latents is None else at.alpha * latents + at.sigma * noise
        if not painted.masks:
            return Start(x)
        masks = to_mask(painted.masks, height, width)
        mask = masks[self._which(masks), :, :: self.downsampling, :: self.downsampling]
        left = pixels * (masks < 0.5)
        if beside:
            return Start(x, beside=np.concatenate([mask, self._latents(left)], axis=1))
        assert latents is not None
        self.noise.normal(self.shape if self.per_image else (len(left), *self.shape[1:]))  # diffusers' for ``left``, unused there too
        return Start(x, keep=Keep(latents, noise, mask))

    def _latents(self, pixels: np.ndarray) -> np.ndarray:
        """A draw from the latents of pictures, [images, c, h, w]: one to a picture, or one to an image where each has its stream."""
        found, which = self.encode(pixels), self._which(pixels)
        if self.per_image:
            found, which = found.of(which), np.arange(self.shape[0])
        drawn: np.ndarray = found.draw(self.noise)[which]
        return drawn

    def _which(self, pictures: np.ndarray) -> np.ndarray:
        """The picture of each image: a single one of all of them, or one for each prompt, whose images follow each other."""
        which: np.ndarray = np.arange(self.shape[0]) * len(pictures) // self.shape[0]
        return which
