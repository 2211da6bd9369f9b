"""Modules that stay in float32 in a graph of a narrower float, because their values overflow there or lose too much.

A module is named by its component and its path, ``vae.decoder.up_blocks.3``, a whole network by its component, ``vae``. What a
kept module is given becomes float32 at its door, and what it returns is rounded behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch.utils import _pytree

from edgediffusion.errors import ArgumentError
from edgediffusion.export.quiet import quiet
from edgediffusion.export.source import Source

WHOLE = ""
_AUTOENCODER = "vae"

Kept = Mapping[str, tuple[str, ...]]  # by component the paths of modules


def read_kept(names: Sequence[str], networks: Iterable[str]) -> Kept:
    """Raises ArgumentError: a name of no component that has a network."""
    known = sorted(set(networks))
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        component, _, path = name.partition(".")
        if component not in known:
            raise ArgumentError(f"There is no component '{component}' to keep in float32", got=name, allowed=", ".join(known))
        found[component] = (*found.get(component, ()), path)
    return found


def kept_by_diffusers(source: Source) -> tuple[str, ...]:
    """The autoencoder, if its configuration says that it overflows in float16 and the pipeline's class heeds that.

    Not every class does, and a configuration that nobody wrote by hand has the flag too: it is AutoencoderKL's default.
    """
    with quiet():  # the class brings others, which say what they lack
        heeds = hasattr(getattr(diffusers, source.class_name, None), "upcast_vae")
    flagged = heeds and _AUTOENCODER in source.components and source.config(_AUTOENCODER).get("force_upcast")
    return (_AUTOENCODER,) if flagged else ()


def keep(network: torch.nn.Module, component: str, paths: Sequence[str], dtype: torch.dtype) -> None:
    """Let the modules at ``paths``, whose weights are in float32 already, compute so in a network of ``dtype``.

    Raises:
        ArgumentError: there is no such module, or it is a list of modules, which nobody calls.
    """
    modules = dict(network.named_modules())
    for path in paths:
        module = modules.get(path)
        if module is None or isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            parent = path.rpartition(".")[0] if module is None else path
            while parent not in modules:
                parent = parent.rpartition(".")[0]
            children = [f"{component}.{parent}.{name}".replace("..", ".") for name, _ in modules[parent].named_children()]
            raise ArgumentError(
                f"The component '{component}' has no module '{path}'" if module is None else f"'{component}.{path}' is a list of modules",
                allowed=", ".join(children) or f"{component}.{parent}",
                do="Name one of these, or the module above.",
            )
        module.register_forward_pre_hook(lambda _, given, named, d=dtype: _cast((given, named), d, torch.float32), with_kwargs=True)
        module.register_forward_hook(lambda _, given, returned, d=dtype: _cast(returned, torch.float32, d))


def _cast(values: Any, held: torch.dtype, wanted: torch.dtype) -> Any:
    return _pytree.tree_map(lambda v: v.to(wanted) if isinstance(v, torch.Tensor) and v.dtype == held else v, values)
