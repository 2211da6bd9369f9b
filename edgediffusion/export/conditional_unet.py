"""The graph of a UNet2DConditionModel, the denoiser of all families of Stable Diffusion before the third, and its facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from edgediffusion.errors import SourceError
from edgediffusion.export import skip_cuts
from edgediffusion.export.families import BATCH, Axis, Part, Tensor
from edgediffusion.export.named import Named
from edgediffusion.export.schedule import Scheduler
from edgediffusion.export.skip_cuts import DOWN, MID
from edgediffusion.export.source import Source

NAME, CLASSES = "unet", ("UNet2DConditionModel",)
ADDED = ("text_embeds", "time_ids")
# What else these networks may be conditioned on, in settings that no pipeline here has.
_PLAIN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")


@dataclass(frozen=True)
class Usual:
    """What to draw with where nobody says: steps, and the scale of guidance."""

    steps: int
    guidance_scale: float


def part(source: Source, *, tokens: int, added: Sequence[Tensor] = (), residuals: Sequence[Tensor] = ()) -> Part:
    """The ``denoise`` graph: sample [b, c, h, w], timestep [1], encoder_hidden_states [b, tokens, width], what is ``added``.

    ``residuals`` are what a ControlNet gives.

    Raises:
        SourceError: the network is of another class, or takes conditions that no pipeline here has.
    """
    config = checked(source, "text_time" if added else None)
    rows, columns = axes(config)
    conditions = [Tensor("encoder_hidden_states", (BATCH, tokens, config["cross_attention_dim"]))]
    if config.get("time_cond_proj_dim"):
        conditions.append(Tensor("timestep_cond", (BATCH, config["time_cond_proj_dim"])))
    sample = Tensor("sample", (BATCH, config["in_channels"], rows, columns))
    inputs = (sample, Tensor("timestep", (1,), "float32"), *conditions, *added, *residuals)
    return Part(
        name=NAME,
        role="denoise",
        network=NAME,
        wrap=partial(Named, names=[tensor.name for tensor in inputs], call=_call),
        inputs=inputs,
        outputs=(Tensor("out_sample", (BATCH, config["out_channels"], rows, columns)),),
        cuts=skip_cuts,
    )


def _call(network: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    found = network(
        given["sample"],
        given["timestep"],
        given["encoder_hidden_states"],
        timestep_cond=given.get("timestep_cond"),
        added_cond_kwargs=added_conditions(given),
        down_block_additional_residuals=tuple(tensor for name, tensor in given.items() if name.startswith(DOWN)) or None,
        mid_block_additional_residual=given.get(MID),
        return_dict=False,
    )
    return found[0]  # type: ignore[no-any-return]


def added_conditions(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    return {name: given[name] for name in ADDED if name in given} or None


def checked(source: Source, addition: str | None) -> dict[str, Any]:
    """The configuration of the UNet, if all that it is conditioned on is known.

    Raises:
        SourceError: it is not.
    """
    source.require_class(NAME, CLASSES)
    config = source.config(NAME)
    odd = {key: config[key] for key in _PLAIN if config.get(key) is not None}
    if config.get("addition_embed_type") != addition:
        odd["addition_embed_type"] = config.get("addition_embed_type")
    if odd:
        raise SourceError(
            f"The UNet of this {source.class_name} is conditioned on something that such a pipeline does not have",
            got=", ".join(f"{key} {value}" for key, value in odd.items()),
            allowed=f"addition_embed_type {addition}, and none of {', '.join(_PLAIN)}",
            do="If it belongs to another pipeline class, load it in diffusers as such and save it.",
        )
    return config


def axes(config: Mapping[str, Any]) -> tuple[Axis, Axis]:
    """Rows and columns of a latent."""
    multiple = coarsest(config)
    return Axis("height", 2 * multiple, multiple), Axis("width", 3 * multiple, multiple)


def coarsest(config: Mapping[str, Any]) -> int:
    """Pixels of the latent that become one at the UNet's lowest level."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a latent of the size that the UNet was trained for."""
    size = config["sample_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def usual(scheduler: Scheduler) -> Usual:
    """A guess from the scheduler, which is all that tells few-step checkpoints from others.

    Those of Turbo and Lightning have an Euler scheduler with trailing spacing, and draw without guidance (Sauer et al. 2023,
    2311.17042; Lin et al. 2024, 2402.13929). Others have trailing spacing for a schedule that ends in pure noise.
    """
    schedule = scheduler.schedule
    if scheduler.sampler in ("euler", "euler-ancestral") and schedule.spacing == "trailing" and not schedule.zero_terminal_snr:
        return Usual(4, 1.0)
    return Usual(4 if scheduler.sampler == "lcm" else 20, 5.0)
