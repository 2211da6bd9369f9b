"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2310.00426; 2024, 2403.04692): a transformer on latents that reads T5's states.

The size and the aspect ratio of the picture, which the larger alpha network reads, follow from the sample's shape and are nodes of
the graph. The half of its output that is a variance is left out: no sampler here reads it.
"""

from __future__ import annotations

from functools import partial

import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, cross_attention, latent_transformer, positions, text_encoders
from edgediffusion.export.families import Part, check_components
from edgediffusion.export.source import Source

_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # diffusers' defaults of max_sequence_length
PIPELINES = tuple(_TOKENS)
OPTIONAL = ()
_USED = {"transformer", "vae", "scheduler", "text_encoder", "tokenizer"}


class Denoiser(torch.nn.Module):
    """``pixels`` is the side in pixels of one of the latent."""

    def __init__(self, network: torch.nn.Module, *, pixels: int):
        super().__init__()
        self.network = network
        self.pixels = pixels
        cross_attention.with_masks(network)
        positions.any_size(network.pos_embed)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """sample [b, c, h, w], timestep [1], encoder_hidden_states [b, tokens, width], encoder_attention_mask [b, tokens]: 1 or 0."""
        batch = sample.shape[0]
        sizes: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            height, width = (self.pixels * torch.ones_like(line).sum(1, keepdim=True) for line in (sample[:, 0, :, 0], sample[:, 0, 0, :]))
            sizes = {"resolution": torch.cat([height, width], dim=1), "aspect_ratio": height / width}
        found = self.network(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep.expand(batch),
            added_cond_kwargs=sizes,
            return_dict=False,
        )
        return found[0][:, : sample.shape[1]]  # type: ignore[no-any-return]


def parts(source: Source) -> tuple[Part, ...]:
    source.require_class("transformer", ("PixArtTransformer2DModel",))
    check_components(source, _USED, OPTIONAL)
    text = text_encoders.masked_t5(source, _TOKENS[source.class_name])
    return (
        text,
        latent_transformer.with_text(source, text, partial(Denoiser, pixels=autoencoder.facts(source).downsampling)),
        *autoencoder.parts(source),
    )


def sampling(source: Source) -> Sampling:
    # as PixArt's pipelines, which do not look at the autoencoder's shift
    return latent_transformer.sampling(source, steps=20, guidance_scale=4.5, shifted=False)
