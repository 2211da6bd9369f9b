"""ControlNets (Zhang et al. 2023, 2302.05543): graphs of the role ``control``, and the inputs of a denoiser that they give.

    sample, timestep, conditions, controlnet_cond ─ ControlNet ─ residuals ─┐
    sample, timestep, conditions ───────────────────────────────── denoiser ┴─ prediction

A control picture, ``controlnet_cond``, has values in 0..1. Residuals are multiplied by ``conditioning_scale``, a number of
each call; those of several ControlNets are added by whoever runs them. Where the denoiser was cut, a part of each
ControlNet's graph gives the residuals that the shallow graph takes, and none of what is below them is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from edgediffusion.bundle import CONTROL, SHALLOW_CONTROL, Component
from edgediffusion.errors import SourceError
from edgediffusion.export import autoencoder, conditional_unet
from edgediffusion.export.cut_graphs import part_of
from edgediffusion.export.families import BATCH, Axis, Part, Tensor
from edgediffusion.export.named import Named
from edgediffusion.export.skip_cuts import DOWN, MID
from edgediffusion.export.source import Source

NAME, CLASSES = "controlnet", ("ControlNetModel",)
PICTURE, SCALE = "controlnet_cond", "conditioning_scale"
# What decides about the residuals and the conditions: settings that a ControlNet has in common with the UNet that it is for.
_SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels", "addition_embed_type")


def names(source: Source) -> tuple[str, ...]:
    """The components that are ControlNets: ``controlnet``, and of several also ``controlnet_1`` and so on."""
    return tuple(name for name in source.components if name == NAME or name.startswith(f"{NAME}_"))


def parts(source: Source, *, tokens: int, added: Sequence[Tensor] = ()) -> tuple[Part, ...]:
    """A ``control`` graph for each ControlNet; arguments as of ``conditional_unet.part``.

    Raises:
        SourceError: one is of a class that is not known, or was made for another network.
    """
    found = names(source) or (NAME,)
    for name in found:
        source.require_class(name, CLASSES)
        _refuse_other_family(source, name)
    return tuple(_part(source, name, tokens, added) for name in found)


def residuals(config: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """What a ControlNet adds: to each skip of the way down, from the first convolution on, and to the middle block's output."""
    channels = config["block_out_channels"]
    layers = config["layers_per_block"]
    each = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    places = [(channels[0], 0)]  # channels, and how often rows and columns were halved
    for level, width in enumerate(channels):
        places += [(width, level)] * each[level]
        if level + 1 < len(channels):
            places.append((width, level + 1))
    shaped = [Tensor(f"{DOWN}{k}", (BATCH, width, *_axes(config, level))) for k, (width, level) in enumerate(places)]
    return (*shaped, Tensor(MID, (BATCH, channels[-1], *_axes(config, len(channels) - 1))))


def shallow_parts(whole: Component, others: Sequence[Component]) -> tuple[Component, ...]:
    """For each shallow graph among ``others``, the part of a ControlNet, ``whole``, that it needs."""
    found = []
    for component in others:
        taken = {spec.name for spec in component.inputs}
        if component.role == "denoise.shallow" and component.cut is not None:
            outputs = [spec for spec in whole.outputs if spec.name in taken]
            found.append(part_of(whole, SHALLOW_CONTROL, component.cut, (), outputs))
    return tuple(found)


def _part(source: Source, name: str, tokens: int, added: Sequence[Tensor]) -> Part:
    config = source.config(name)
    suffix = name.removeprefix(NAME)
    rows, columns = conditional_unet.axes(config)
    factor = autoencoder.facts(source).downsampling
    lines = [Axis(f"image_{axis.name}", axis.example * factor, axis.multiple * factor, of=axis.name) for axis in (rows, columns)]
    inputs = (
        Tensor("sample", (BATCH, config["in_channels"], rows, columns)),
        Tensor("timestep", (1,), "float32"),
        Tensor("encoder_hidden_states", (BATCH, tokens, config["cross_attention_dim"])),
        *added,
        Tensor(f"{PICTURE}{suffix}", (BATCH, config.get("conditioning_channels", 3), *lines)),
        Tensor(f"{SCALE}{suffix}", (1,)),
    )
    return Part(
        name=name,
        role=CONTROL,
        network=name,
        wrap=partial(Named, names=[tensor.name for tensor in inputs], call=partial(_call, suffix)),
        inputs=inputs,
        outputs=residuals(config),
    )


def _call(suffix: str, network: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    down, middle = network(
        given["sample"],
        given["timestep"],
        given["encoder_hidden_states"],
        controlnet_cond=given[f"{PICTURE}{suffix}"],
        conditioning_scale=given[f"{SCALE}{suffix}"],
        added_cond_kwargs=conditional_unet.added_conditions(given),
        return_dict=False,
    )
    return *down, middle


def _axes(config: Mapping[str, Any], level: int) -> tuple[Axis, Axis]:
    part = 2**level
    rows, columns = (
        axis if level == 0 else Axis(f"{axis.name}/{part}", axis.example // part, axis.multiple // part, of=axis.name)
        for axis in conditional_unet.axes(config)
    )
    return rows, columns


def _refuse_other_family(source: Source, name: str) -> None:
    own, unet = source.config(name), source.config("unet")
    different = [key for key in _SHARED if own.get(key) != unet.get(key)]
    if different:
        raise SourceError(
            f"The ControlNet '{name}' was made for another network than the UNet of this {source.class_name}",
            got=", ".join(f"{key} {own.get(key)}" for key in different),
            allowed=", ".join(f"{key} {unet.get(key)}" for key in different),
            do="Take one that was trained for this family: Stable Diffusion 1, 2 and XL each have their own.",
        )
    if own.get("global_pool_conditions"):
        raise SourceError(
            f"The ControlNet '{name}' is led by a picture as a whole and works in diffusers' guess mode alone",
            got="global_pool_conditions true",
            allowed="false",
            do="Take another ControlNet.",
        )
    wanted, factor = autoencoder.facts(source).downsampling, 2 ** (len(own.get("conditioning_embedding_out_channels", (0,) * 4)) - 1)
    if factor != wanted:
        raise SourceError(
            f"The ControlNet '{name}' makes latents of its picture that are of another size than the autoencoder's",
            got=f"1/{factor} of the picture",
            allowed=f"1/{wanted}",
            do="Take ControlNet and autoencoder from the same family.",
        )
