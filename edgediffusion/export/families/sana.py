"""Sana (Xie et al. 2024, 2410.10629): a transformer with linear attention on latents that are 32 times smaller, trained as a flow.

Its texts are read by Gemma, after an instruction of how to read a prompt. That instruction is not in the source: it is an argument
of diffusers' SanaPipeline, whose default is taken.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import diffusers
import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, block_cuts, cross_attention, positions, text_encoders
from edgediffusion.export.families import BATCH, Axis, Part, Tensor, check_components
from edgediffusion.export.schedule import read_scheduler
from edgediffusion.export.source import Source

PIPELINES = ("SanaPipeline",)
OPTIONAL = ()
TOKENS = 300  # diffusers' default of max_sequence_length
_USED = {"transformer", "vae", "scheduler", "text_encoder", "tokenizer"}


class Denoiser(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network
        cross_attention.with_masks(network)
        positions.any_size(network.patch_embed)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """sample [b, c, h, w], timestep [1], encoder_hidden_states [b, tokens, width], encoder_attention_mask [b, tokens]: 1 or 0."""
        scale: float = self.network.config.timestep_scale  # type: ignore[union-attr, assignment]
        found = self.network(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep.expand(sample.shape[0]) * scale,
            return_dict=False,
        )
        return found[0][:, : sample.shape[1]]  # type: ignore[no-any-return]


def parts(source: Source) -> tuple[Part, ...]:
    source.require_class("transformer", ("SanaTransformer2DModel",))
    check_components(source, _USED, OPTIONAL)
    text = text_encoders.gemma(source, TOKENS, _instruction())
    return (text, _transformer(source, text), *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    transformer, latents = source.settings("transformer"), autoencoder.facts(source)
    scheduler = read_scheduler(source)
    size = transformer["sample_size"] * latents.downsampling
    return Sampling(
        prediction=scheduler.prediction,
        guidance="classifier-free",
        schedule=scheduler.schedule,
        latent_channels=latents.channels,
        downsampling=latents.downsampling,
        latent_scale=latents.scale,
        latent_shift=0.0,  # as SanaPipeline, which does not look at it
        height=size,
        width=size,
        size_multiple=latents.downsampling * transformer["patch_size"],
        fixed_size=False,
        sampler=scheduler.sampler,
        steps=20,
        guidance_scale=4.5,
    )


def _instruction() -> str:
    lines = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def _transformer(source: Source, text: Part) -> Part:
    config = source.settings("transformer")
    patch = config["patch_size"]
    rows, columns = Axis("height", 4 * patch, patch), Axis("width", 6 * patch, patch)
    return Part(
        name="transformer",
        role="denoise",
        network="transformer",
        wrap=Denoiser,
        inputs=(
            Tensor("sample", (BATCH, config["in_channels"], rows, columns)),
            Tensor("timestep", (1,), "float32"),
            *(replace(output, name=text.feeds.get(output.name, output.name)) for output in text.outputs),
        ),
        outputs=(Tensor("out_sample", (BATCH, config["in_channels"], rows, columns)),),
        cuts=block_cuts.CROSS_ATTENTION,
    )
