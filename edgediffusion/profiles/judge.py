"""A judge of pictures: a network that looks at them, and what it knows of classes and of real pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.profiles.gaussian import Gaussian
from edgediffusion.registry import require
from edgediffusion.runtimes.engines import Binding, Session

BATCH = 32  # pictures that go through the network at once


@dataclass(frozen=True)
class Input:
    """What the network takes: (pixel - mean) / std of pixels in 0..1, one number for all channels or one for each."""

    layout: str
    height: int
    width: int
    channels: int
    mean: float | Sequence[float]
    std: float | Sequence[float]


@dataclass(frozen=True)
class Outputs:
    """Names of the network's outputs; a judge has those of its metrics."""

    logits: str | None = None
    features: str | None = None
    layers: Sequence[str] = ()


@dataclass(frozen=True)
class Look:
    """What was seen in n pictures: ``logits`` [n, classes], ``features`` [n, features], ``layers`` each [n, channels, places].

    float32; None or empty where the judge has no such output.
    """

    logits: np.ndarray | None
    features: np.ndarray | None
    layers: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Judge:
    """``classes`` are the words for each class; ``prompts`` what to ask for where the caller has no prompts of his own.

    ``real`` is the Gaussian of held-out real pictures' features; ``yardsticks`` what real pictures get from a metric: a number,
    or one for each number of pictures. ``judges.load`` makes one of a folder.
    """

    name: str
    input: Input
    outputs: Outputs
    classes: tuple[tuple[str, ...], ...]
    prompts: tuple[str, ...]
    real: Gaussian | None
    yardsticks: Mapping[str, float | Mapping[int, float]]
    session: Session = field(repr=False)
    _bound: list[Binding] = field(default_factory=list, repr=False)  # one at most

    @property
    def has(self) -> frozenset[str]:
        """Which of ``features``, ``layers``, ``classes`` and ``real`` there are."""
        there = {
            "features": self.outputs.features,
            "layers": self.outputs.layers,
            "classes": self.outputs.logits and self.classes,
            "real": self.real,
        }
        return frozenset(name for name, value in there.items() if value)

    def look(self, pixels: np.ndarray, *, layers: bool = True) -> Look:
        """Look at pictures, float [n, h, w, c] in 0..1, of any size; those of another size than the network's are resized.

        ``layers`` take many times the memory of the pictures: look at a few at a time, or leave them out.

        Raises:
            ArgumentError: colours for a network of greys.
        """
        kept = self.outputs.layers if layers else ()
        named = [name for name in (self.outputs.logits, self.outputs.features, *kept) if name]
        parts = [self._run(pixels[at : at + BATCH], named) for at in range(0, len(pixels), BATCH)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in named}
        logits, features = (None if name is None else joined[name] for name in (self.outputs.logits, self.outputs.features))
        return Look(logits, features, tuple(self._as_layer(joined[name]) for name in kept))

    def class_of(self, prompt: str) -> int:
        """The class that a prompt names, -1 for none or several. A name within a longer one ("shirt" in "t-shirt") is no name."""
        spans = [
            (match.span(), number)
            for number, words in enumerate(self.classes)
            for word in words
            for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
        ]
        alone = {n for (a, b), n in spans if not any(c <= a and b <= d and d - c > b - a for (c, d), _ in spans)}
        return alone.pop() if len(alone) == 1 else -1

    def yardstick(self, metric: str, pictures: int) -> float | None:
        """What real pictures get from a metric. Where that depends on their number, between the known numbers: linear in 1 / n.

        None where nothing is known, or nothing for so few or so many pictures.
        """
        known = self.yardsticks.get(metric)
        if not isinstance(known, Mapping):
            return known
        counts = sorted(known, reverse=True)
        if not counts[-1] <= pictures <= counts[0]:
            return None
        return float(np.interp(1 / pictures, [1 / n for n in counts], [known[n] for n in counts]))

    def _run(self, pixels: np.ndarray, named: Sequence[str]) -> dict[str, np.ndarray]:
        """A last, smaller batch is filled up with zeros: the network is bound once, and sees each picture alike in any batch."""
        feed, binding = self._feed(pixels), self._binding()
        (buffer,) = binding.inputs.values()
        found: dict[str, list[np.ndarray]] = {name: [] for name in named}
        for at in range(0, len(feed), len(buffer)):
            part = feed[at : at + len(buffer)]
            buffer[: len(part)], buffer[len(part) :] = part, 0
            binding.run()
            for name in named:
                found[name].append(binding.outputs[name][: len(part)].astype(np.float32))  # a copy: the buffer is used again
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _binding(self) -> Binding:
        if not self._bound:
            taken, (spec,) = self.input, self.session.inputs
            sizes = {"n": BATCH, "h": taken.height, "w": taken.width, "c": taken.channels}
            axes = {axis: sizes[letter] for axis, letter in zip(spec.shape, taken.layout, strict=True) if isinstance(axis, str)}
            self._bound.append(self.session.bind(axes))
        return self._bound[0]

    def _feed(self, pixels: np.ndarray) -> np.ndarray:
        taken = self.input
        if pixels.shape[3] != taken.channels:
            if pixels.shape[3] != 1:
                raise ArgumentError(f"The judge '{self.name}' cannot see these colours", got=f"{pixels.shape[3]} channels", allowed="1")
            pixels = np.repeat(pixels, taken.channels, axis=3)
        if pixels.shape[1:3] != (taken.height, taken.width):
            pixels = _resized(pixels, taken.height, taken.width)
        feed = ((pixels - np.asarray(taken.mean)) / np.asarray(taken.std)).astype(np.float32)
        return np.asarray(feed.transpose(0, 3, 1, 2) if taken.layout == "nchw" else feed)

    def _as_layer(self, output: np.ndarray) -> np.ndarray:
        """An output [n, channels, ...], or [n, ..., channels], as [n, channels, places]."""
        first = output if self.input.layout == "nchw" else np.moveaxis(output, -1, 1)
        return first.reshape(*first.shape[:2], -1)


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, with the filter widened when shrinking: resizing without that is known to move Fréchet distances (Parmar et al.
    2022, 2104.11222)."""
    image = require("PIL.Image", extra="cpu", purpose="Resizing pictures for a judge")
    planes = pixels.transpose(0, 3, 1, 2).reshape(-1, *pixels.shape[1:3]).astype(np.float32)
    small = [np.asarray(image.fromarray(plane).resize((width, height), image.BILINEAR)) for plane in planes]
    return np.stack(small).reshape(len(pixels), pixels.shape[3], height, width).transpose(0, 2, 3, 1)
