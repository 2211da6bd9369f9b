"""Sana (Xie et al. 2024, 2410.10629): a transformer with linear attention on latents that are 32 times smaller, trained as a flow.

Its texts are read by Gemma, after an instruction of how to read a prompt. That instruction is not in the source: it is an argument
of diffusers' SanaPipeline, whose default is taken.
"""

from __future__ import annotations

import inspect

import diffusers
import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, cross_attention, latent_transformer, positions, text_encoders
from edgediffusion.export.families import Part, check_components
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
    return (text, latent_transformer.with_text(source, text, Denoiser), *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    # as SanaPipeline, which does not look at the autoencoder's shift
    return latent_transformer.sampling(source, steps=20, guidance_scale=4.5, shifted=False)


def _instruction() -> str:
    lines = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
