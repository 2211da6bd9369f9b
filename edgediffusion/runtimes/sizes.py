"""Ranges of the sizes of axes, by their names: what an engine is built for. ``batch=1:2:4,height=64`` in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgediffusion.bundle import Bundle, TensorSpec, axis_size
from edgediffusion.errors import ArgumentError, EngineError


@dataclass(frozen=True)
class SizeRange:
    """An axis may have ``smallest`` to ``largest`` entries, and is fastest with ``usual`` ones (TensorRT's min, opt and max)."""

    smallest: int
    usual: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.usual <= self.largest:
            raise ArgumentError(
                "A range of sizes does not rise", got=str(self), allowed="smallest:usual:largest, each at least 1 and the one before it"
            )

    def __str__(self) -> str:
        return str(self.usual) if self.smallest == self.largest else f"{self.smallest}:{self.usual}:{self.largest}"

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self.smallest <= size <= self.largest


Sizes = Mapping[str, SizeRange]


def parse_sizes(text: str) -> dict[str, SizeRange]:
    """``batch=1:2:4,height=64`` as ranges; one number is a size that is fixed.

    Raises:
        ArgumentError: it is spelt otherwise, an axis comes twice, or a range does not rise.
    """
    found: dict[str, SizeRange] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\w.]+)\s*=\s*(\d+)(?::(\d+):(\d+))?\s*", part)
        if match is None or match[1] in found:
            raise ArgumentError(
                "Sizes cannot be read", got=repr(text), allowed="AXIS=SMALLEST:USUAL:LARGEST or AXIS=SIZE, each axis once, commas between"
            )
        numbers = [int(number) for number in match.groups()[1:] if number]
        found[match[1]] = SizeRange(*numbers) if len(numbers) == 3 else SizeRange(numbers[0], numbers[0], numbers[0])
    return found


def usual_sizes(bundle: Bundle) -> dict[str, SizeRange]:
    """What a bundle is drawn with when nothing else is asked for: one picture of its own size, and up to two.

    With classifier-free guidance a picture is two rows of a batch. Height and width are fixed: with a range of them TensorRT's
    kernels serve no size as well (NVIDIA/TensorRT#3246), and OpenVINO's CPU kernels take twice the time (docs/engines.md).
    """
    facts = bundle.sampling
    if facts is None:
        return {}
    rows = 2 if facts.guidance == "classifier-free" else 1
    fixed = {
        "height": facts.height // facts.downsampling,
        "width": facts.width // facts.downsampling,
        "image_height": facts.height,
        "image_width": facts.width,
    }
    sizes = {"batch": SizeRange(1, rows, 2 * rows), **{axis: SizeRange(size, size, size) for axis, size in fixed.items()}}
    for text in (component.tokenizer for component in bundle.components):
        if text is not None and text.prefix_tokens:  # a negative prompt goes without the prefix
            most = text.length + text.prefix_tokens
            sizes["tokens"] = SizeRange(text.length, most, most)
    return sizes


def axes_of(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """The named axes of some tensors, in their order."""
    return tuple(dict.fromkeys(size for spec in specs for size in spec.shape if isinstance(size, str)))


def range_of(axis: str, sizes: Sizes) -> SizeRange | None:
    """The range of an axis: its own, or that of what it is a part of (``height/2``, see ``bundle.axis_size``). None if there is none."""
    if axis in sizes:
        return sizes[axis]
    ends = [axis_size(axis, {name: getattr(r, end) for name, r in sizes.items()}) for end in ("smallest", "usual", "largest")]
    known = [size for size in ends if size is not None]
    return SizeRange(*known) if len(known) == len(ends) else None


def ranges_for(specs: Sequence[TensorSpec], sizes: Sizes, graph: str) -> dict[str, SizeRange]:
    """The ranges of the axes that some inputs have.

    Raises:
        EngineError: an axis has none.
    """
    found = {axis: range_of(axis, sizes) for axis in axes_of(specs)}
    if lacking := [axis for axis, known in found.items() if known is None]:
        raise EngineError(
            f"The graph '{graph}' has axes without a range of sizes",
            got=", ".join(lacking),
            do="Say what they may be: --shapes " + ",".join(f"{axis}=SMALLEST:USUAL:LARGEST" for axis in lacking),
        )
    return {axis: known for axis, known in found.items() if known is not None}


def check_sizes(axes: Mapping[str, int], ranges: Sizes, graph: str) -> None:
    """Refuse sizes that an engine was not built for.

    Raises:
        EngineError: a size is out of its range; the message has the option that builds an engine for it.
    """
    wrong = [axis for axis, allowed in ranges.items() if axis in axes and axes[axis] not in allowed]
    if wrong:
        of = {axis: (axes.get(axis, r.usual), r) for axis, r in ranges.items() if axis.replace("_", "").isalnum()}  # not parts of others
        wider = [f"{axis}={SizeRange(min(r.smallest, size), r.usual, max(r.largest, size))}" for axis, (size, r) in of.items()]
        raise EngineError(
            f"The engine '{graph}' was built for other sizes",
            got=", ".join(f"{axis} {axes[axis]}" for axis in wrong),
            allowed=", ".join(f"{axis} {ranges[axis].smallest} to {ranges[axis].largest}" for axis in wrong),
            do=f"Build it for them: edgediffusion build BUNDLE --target NAME --shapes {','.join(wider)} -o NEW",
        )
