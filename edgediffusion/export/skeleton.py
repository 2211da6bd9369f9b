"""A network without its weights: parameters are fake tensors, which have a shape and a dtype and no memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@dataclass(frozen=True)
class Skeleton:
    """``shapes`` is of all that a checkpoint must hold; ``tied`` groups the names that are one tensor.

    ``constants`` are the buffers that no checkpoint holds, with the values that the constructor computed. ``dtype`` is that of
    what the network takes and gives.
    """

    network: torch.nn.Module
    fake: FakeTensorMode
    shapes: Mapping[str, tuple[int, ...]]
    tied: tuple[frozenset[str], ...]
    constants: Mapping[str, torch.Tensor]
    prefix: str
    dtype: torch.dtype


def skeleton(build: Callable[[], torch.nn.Module], dtype: torch.dtype, kept: Sequence[str] = ()) -> Skeleton:
    """Build a network and take its weights out, as if it had been converted to ``dtype``.

    Modules that the network itself says must stay in float32 do, and those whose paths are in ``kept``.
    """
    network = _without_values(build)
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    stored = set(network.state_dict(keep_vars=True))
    constants = {name: buffer for name, buffer in network.named_buffers() if name not in stored}
    names: dict[int, set[str]] = defaultdict(set)
    made: dict[int, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor, place in _tensors(network):
        if name in stored:
            shapes[name] = tuple(tensor.shape)
            names[id(tensor)].add(name)
        kind = _dtype(network, name, tensor.dtype, dtype, kept)
        if id(tensor) not in made:
            with fake:
                empty = torch.empty(tensor.shape, dtype=kind)
            made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else empty
        if name in constants:
            constants[name] = tensor.to(kind)
        place[name.rsplit(".", 1)[-1]] = made[id(tensor)]
    tied = tuple(frozenset(group) for group in names.values() if len(group) > 1)
    return Skeleton(network, fake, shapes, tied, constants, getattr(network, "base_model_prefix", "") or "", dtype)


def _without_values(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The network on the device ``meta``, where nothing is computed, if all of its tensors are stored; else with its buffers' values.

    Stable Diffusion 3's table of positions is stored, and computing it takes 3.5 GB.
    """
    with suppress(Exception), torch.device("meta"):  # constructors that look at values fail in whatever way they like
        network = build()
        held = {id(tensor) for _, tensor, _ in _tensors(network)}
        plain = [v for m in network.modules() for v in vars(m).values() if isinstance(v, torch.Tensor) and id(v) not in held]
        if not plain and set(dict(network.named_buffers())) <= set(network.state_dict(keep_vars=True)):
            return network
    with _no_parameters():
        return build()


def _tensors(network: torch.nn.Module) -> list[tuple[str, torch.Tensor, dict[str, torch.Tensor | None]]]:
    """Every parameter and buffer by its full name, tied ones once per name, with the dictionary that holds it.

    A list, and not a generator, of the tensors: they must live until all are replaced, or their ids would come again.
    """
    found: list[tuple[str, torch.Tensor, dict[str, torch.Tensor | None]]] = []
    for path, module in network.named_modules(remove_duplicate=False):
        for place in (module._parameters, module._buffers):
            found += [(f"{path}.{key}" if path else key, tensor, place) for key, tensor in place.items() if tensor is not None]
    return found


def _dtype(network: torch.nn.Module, name: str, own: torch.dtype, wanted: torch.dtype, kept: Sequence[str]) -> torch.dtype:
    if not own.is_floating_point:
        return own
    parts = getattr(network, "_keep_in_fp32_modules", None) or ()
    wide = any(part in parts for part in name.split(".")) or any(name.startswith(f"{path}.") for path in kept)
    return torch.float32 if wide else wanted


@contextmanager
def _no_parameters() -> Iterator[None]:
    """Within the block a module's parameters move to the device ``meta``, one by one as the module registers them.

    A module registers a parameter before it fills it with random numbers, so nothing is drawn either; and a big
    empty tensor that nothing touched costs no memory. Buffers stay, for their values are computed and not trained.
    """
    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = torch.nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
