"""Pictures that lead a network: ControlNets (Zhang et al. 2023, 2302.05543), graphs of the role ``control`` that run before it.

Such a graph takes what the denoiser takes, a picture in 0..1, ``controlnet_cond``, and ``conditioning_scale``; what it gives
are inputs of the denoiser, tensors of one name being one array. Several of them (their inputs have a number, ``_1`` and so
on) are added up. One whose scale is 0 at a call does not run. In guess mode the unconditional rows are not led, and what goes to a
shallower skip counts less: from a tenth at the first one to the whole in the middle. Arguments are named, and mean, as in diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgediffusion.bundle import CONTROL, SHALLOW_CONTROL, Bundle, Component, TensorSpec
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.engines import Binding
from edgediffusion.runtimes.images import pictures, size, to_levels

if TYPE_CHECKING:
    from edgediffusion.runtimes.network import Call, Network
    from edgediffusion.runtimes.schedules import Points

PICTURE, SCALE = "controlnet_cond", "conditioning_scale"


@dataclass(frozen=True)
class Lead:
    """How one ControlNet leads: its scale, and the part of the calls."""

    scale: float
    start: float
    end: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ArgumentError("controlnet_conditioning_scale cannot be used", got=self.scale, allowed="a finite number; 1 is usual")
        if not 0 <= self.start < self.end <= 1:
            raise ArgumentError(
                "The part of the steps that a control picture leads cannot be used",
                got=f"control_guidance_start {self.start:g}, control_guidance_end {self.end:g}",
                allowed="0 to 1, the start below the end",
            )

    def at(self, call: int, calls: int) -> float:
        """The scale at one of so many calls: 0 outside of the part."""
        return 0.0 if call / calls < self.start or (call + 1) / calls > self.end else self.scale


@dataclass(frozen=True)
class Control:
    """What a request says to ControlNets, however many there are: numbers are for all of them, or lists with one for each."""

    image: Any
    scale: float | Sequence[float]
    start: float | Sequence[float]
    end: float | Sequence[float]
    guess: bool = False

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the first picture, if there is one."""
        first = self.image
        while isinstance(first, Sequence) and not isinstance(first, (str, bytes)) and len(first):
            first = first[0]
        return None if first is None else size(pictures(first)[0])

    def leads(self, count: int) -> tuple[Lead, ...]:
        """One for each of so many ControlNets.

        Raises:
            ArgumentError: too few or too many numbers, or numbers that cannot be used.
        """
        scales, starts, ends = (
            _each(name, given, count)
            for name, given in (
                ("controlnet_conditioning_scale", self.scale),
                ("control_guidance_start", self.start),
                ("control_guidance_end", self.end),
            )
        )
        return tuple(map(Lead, scales, starts, ends))

    def arrays(self, inputs: Sequence[TensorSpec], shape: tuple[int, int], images: int, prompts: int) -> dict[str, np.ndarray]:
        """The pictures as float32 [images, channels, height, width] in 0..1, for the ``inputs`` of the ControlNets.

        Raises:
            ArgumentError: too few or too many pictures, or something that is none.
        """
        if self.image is None:
            if any(lead.scale for lead in self.leads(len(inputs))):
                raise ArgumentError(
                    "This network is led by a picture", do="Give control_image; controlnet_conditioning_scale 0 draws without one."
                )
            return {spec.name: np.zeros((images, int(spec.shape[1]), *shape), np.float32) for spec in inputs}
        found = {}
        for spec, given in zip(inputs, _several(self.image, len(inputs)) if len(inputs) > 1 else [self.image], strict=True):
            shown = pictures(given)
            if len(shown) not in (1, prompts):
                raise ArgumentError("A list of control pictures has one per prompt", got=f"{len(shown)} for {prompts} prompts")
            levels = to_levels(shown, int(spec.shape[1]), *shape)
            found[spec.name] = levels[np.arange(images) * len(levels) // images]
        return found


def with_scales(network: Network, leads: Sequence[Lead], points: Points, *, unled: int | None = None) -> Network:
    """A network whose calls know the scales of their ControlNets, and in guess mode how many of the first rows are ``unled``.

    A question that is no step of the walk has the number of another call: it is taken for the one whose time step is nearest.
    """
    if not leads:
        return network
    timesteps = np.array([point.timestep for point in points.at])

    def ask(call: Call) -> np.ndarray:
        own = call.number < len(timesteps) and timesteps[call.number] == call.timestep
        number = call.number if own else int(np.abs(timesteps - call.timestep).argmin())
        return network(replace(call, scales=tuple(lead.at(number, len(timesteps)) for lead in leads), unled=unled))

    return ask


class Controls:
    """ControlNets with their buffers: they fill the denoiser's arrays when its graphs are about to run.

    ``bound`` are the components and their bindings. Those of a cut serve the shallow graph of that cut, the others every graph;
    of each kind there is one for each ControlNet, in the same order.
    """

    def __init__(self, bound: Sequence[tuple[Component, Binding]]):
        self._of: dict[str | None, list[Binding]] = {}
        for component, binding in bound:
            self._of.setdefault(component.cut, []).append(binding)
        self._scales: tuple[float, ...] = ()
        self._unled: int | None = None
        self._parts = _parts(self.gives)
        self._fresh = False

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of what the denoiser takes from them."""
        return tuple(self._of[None][0].outputs) if self._of else ()

    def feed(self, call: Call) -> None:
        """A new call: nothing of the last one's residuals holds."""
        self._scales, self._unled, self._fresh = call.scales, call.unled, False

    def lead(self, cut: str | None) -> None:
        """Fill the arrays that the graph of a cut takes, or the whole one's, unless the whole's are filled already."""
        bindings = self._of.get(cut, self._of.get(None, []))
        if self._fresh or not bindings:
            return
        self._fresh = bindings is self._of[None]
        given = bindings[0].outputs  # the arrays of all of them
        running = [(binding, scale) for binding, scale in zip(bindings, self._scales, strict=True) if scale]
        if self._unled is not None and all(self._unled >= len(array) for array in given.values()):
            running = []
        if not running:
            for array in given.values():
                array[...] = 0
        total: Mapping[str, np.ndarray] = {}
        for number, (binding, scale) in enumerate(running):
            next(array for name, array in binding.inputs.items() if name.startswith(SCALE))[...] = scale
            binding.run()
            for name, array in total.items():
                binding.outputs[name][...] += array
            if number + 1 < len(running):  # the next one writes there
                total = {name: array.copy() for name, array in binding.outputs.items()}
        if self._unled is not None:
            for name, array in given.items():
                array *= self._parts[name]
                array[: self._unled] = 0


def components(bundle: Bundle, denoisers: Sequence[Component]) -> tuple[Component, ...]:
    """The ControlNets' graphs that denoising graphs need: the whole ones, and those of their cuts."""
    cuts = {component.cut for component in denoisers if component.cut is not None}
    return (*bundle.with_role(CONTROL), *(c for c in bundle.with_role(SHALLOW_CONTROL) if c.cut in cuts))


def _parts(names: Sequence[str]) -> dict[str, float]:
    """How much of each residual counts in guess mode, as in diffusers' ControlNetModel; those without a number go to the middle."""
    deeper = sorted(names, key=lambda name: (not name[-1].isdigit(), len(name), name))
    return dict(zip(deeper, np.logspace(-1, 0, len(deeper)).tolist(), strict=True))


def _each(name: str, given: float | Sequence[float], count: int) -> list[float]:
    found = list(given) if isinstance(given, Sequence) else [given] * count
    if len(found) != count:
        raise ArgumentError(f"A list for {name} has one number for each ControlNet", got=len(found), allowed=str(count))
    return [float(number) for number in found]


def _several(given: Any, count: int) -> list[Any]:
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)) or len(given) != count:
        got = f"a list of {len(given)}" if isinstance(given, Sequence) else type(given).__name__
        raise ArgumentError(
            "Each of several ControlNets is led by a picture of its own", got=got, allowed=f"a list of {count} for control_image"
        )
    return list(given)
