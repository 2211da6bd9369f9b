"""Pictures in and out: Pillow's images and NumPy arrays to what a network takes, and its pixels to Pillow's images.

A picture is a Pillow image of any mode, or an array [h, w] or [h, w, c] of uint8, bool, or floats in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.registry import require

_WANTED = "Pillow images, or arrays [h, w] or [h, w, c] of uint8, or of floats in 0..1"


def to_pixels(decoded: np.ndarray) -> np.ndarray:
    """A decoder's [n, c, h, w] in -1..1 to float32 [n, h, w, c] in 0..1."""
    pixels = (decoded.astype(np.float32) / 2 + 0.5).clip(0, 1)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def to_images(pixels: np.ndarray) -> list[Any]:
    """Pillow images of [n, h, w, c] in 0..1: mode L for one channel, RGB for three."""
    image = require("PIL.Image", extra="cpu", purpose="Making an image")
    levels = (pixels * 255).round().astype(np.uint8)
    return [image.fromarray(level[:, :, 0] if level.shape[2] == 1 else level) for level in levels]


def open_image(file: Path) -> Any:
    """The picture of a file as a Pillow image, turned as its EXIF data say.

    Raises:
        ArgumentError: the file is missing, is no picture, or is damaged.
    """
    library = require("PIL.Image", extra="cpu", purpose="Reading a picture")
    operations = require("PIL.ImageOps", extra="cpu", purpose="Reading a picture")
    try:
        with library.open(file) as image:
            return operations.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, library.DecompressionBombError) as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ArgumentError(f"'{file}' cannot be read as a picture", got=what, allowed="what Pillow reads: PNG, JPEG, WebP, ...") from None


def pictures(given: Any) -> tuple[Any, ...]:
    """One picture, a list of them or an array [n, h, w, c], as a tuple.

    Raises:
        ArgumentError: something in it is no picture.
    """
    many = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    found = tuple(given) if many or (isinstance(given, np.ndarray) and given.ndim == 4) else (given,)
    for one in found:
        if not _is_pillow(one) and not (isinstance(one, np.ndarray) and one.ndim in (2, 3)):
            raise ArgumentError("This is no picture", got=_told(one), allowed=_WANTED)
    if not found:
        raise ArgumentError("The list of pictures is empty", allowed=_WANTED)
    return found


def size(picture: Any) -> tuple[int, int]:
    """Height and width."""
    height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
    return int(height), int(width)


def to_input(given: Sequence[Any], channels: int, height: int, width: int) -> np.ndarray:
    """Pictures to float32 [n, channels, height, width] in -1..1, as diffusers' VaeImageProcessor makes them.

    A Pillow image of another size is resized (Lanczos), of another mode converted; an array must fit.

    Raises:
        ArgumentError: an array of another size, number of channels or type.
    """
    return 2 * to_levels(given, channels, height, width) - 1


def to_levels(given: Sequence[Any], channels: int, height: int, width: int) -> np.ndarray:
    """As ``to_input``, in 0..1."""
    return np.stack([_levels(picture, channels, height, width) for picture in given])


def to_mask(given: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Masks to float32 [n, 1, height, width], 1 where the picture is painted anew: what is brighter than half.

    Pictures are treated, and refused, as in ``to_input``.
    """
    return np.stack([(_levels(picture, 1, height, width) >= 0.5).astype(np.float32) for picture in given])


def _levels(picture: Any, channels: int, height: int, width: int) -> np.ndarray:
    """float32 [channels, height, width] in 0..1."""
    array = picture if isinstance(picture, np.ndarray) else np.array(_fitted(picture, channels, height, width))
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape != (height, width, channels):
        raise ArgumentError("An array of a picture has another shape", got=array.shape, allowed=f"({height}, {width}, {channels})")
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / np.float32(255)
    elif array.dtype.kind not in "bf" or not (array.min() >= 0 and array.max() <= 1):
        values = f"{array.dtype} from {array.min()} to {array.max()}"
        raise ArgumentError("An array of a picture has other values", got=values, allowed="uint8, or floats in 0..1")
    return np.ascontiguousarray(array.transpose(2, 0, 1), np.float32)


def _fitted(picture: Any, channels: int, height: int, width: int) -> Any:
    """Resized before it is converted, as diffusers does."""
    library = require("PIL.Image", extra="cpu", purpose="Resizing a picture")
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise ArgumentError(f"A network of {channels} channels takes no Pillow images", do="Give an array [h, w, c].")
    resized = picture if picture.size == (width, height) else picture.resize((width, height), library.Resampling.LANCZOS)
    return resized.convert(modes[channels])


def _is_pillow(given: Any) -> bool:
    return all(hasattr(given, name) for name in ("resize", "convert", "size"))


def _told(given: Any) -> str:
    return f"an array of shape {given.shape}" if isinstance(given, np.ndarray) else f"{type(given).__name__} {str(given)[:60]!r}"
