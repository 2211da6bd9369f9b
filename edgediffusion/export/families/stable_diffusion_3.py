"""Stable Diffusion 3 (Esser et al. 2024, 2403.03206): a transformer on latents, trained by flow matching.

Two CLIP encoders, and T5 where the pipeline has it. What diffusers does between encoders and transformer, joining
their states, is nodes of the ``denoise`` graph, so that each encoder's output is a condition as it comes. Without T5 its states are
zeros: one token stands for all of them (``joint_attention``).
"""

from __future__ import annotations

from functools import partial

import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, block_cuts, joint_attention, latent_transformer, text_encoders
from edgediffusion.export.families import BATCH, Axis, Part, Tensor, check_components
from edgediffusion.export.source import Source

PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
OPTIONAL = ("feature_extractor", "image_encoder")
T5_TOKENS = 256  # diffusers' default of max_sequence_length; its zeros without T5 are as many
_CLIPS = ("", "_2")
_USED = {"transformer", "vae", "scheduler", *(f"{k}{s}" for k in ("text_encoder", "tokenizer") for s in (*_CLIPS, "_3"))}


class Denoiser(torch.nn.Module):
    def __init__(self, network: torch.nn.Module, *, reads_t5: bool):
        super().__init__()
        self.network = network
        if not reads_t5:
            joint_attention.repeat_last(network, T5_TOKENS)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        clip_hidden_states: torch.Tensor,
        clip_hidden_states_2: torch.Tensor,
        clip_text_embeds: torch.Tensor,
        clip_text_embeds_2: torch.Tensor,
        t5_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """sample [b, c, h, w], timestep [1]; the states of the encoders [b, tokens, width], their embeddings [b, width]."""
        width: int = self.network.config.joint_attention_dim  # type: ignore[union-attr, assignment]
        clip = torch.cat([clip_hidden_states, clip_hidden_states_2], dim=-1)
        clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
        t5 = clip.new_zeros(clip.shape[0], 1, width) if t5_hidden_states is None else t5_hidden_states
        found = self.network(
            hidden_states=sample,
            timestep=timestep.expand(sample.shape[0]),
            encoder_hidden_states=torch.cat([clip, t5], dim=1),
            pooled_projections=torch.cat([clip_text_embeds, clip_text_embeds_2], dim=-1),
            return_dict=False,
        )
        return found[0]  # type: ignore[no-any-return]


def parts(source: Source) -> tuple[Part, ...]:
    source.require_class("transformer", ("SD3Transformer2DModel",))
    check_components(source, _USED, OPTIONAL)
    texts = [text_encoders.clip_projected(source, suffix) for suffix in _CLIPS]
    if "text_encoder_3" in source.components:
        texts.append(text_encoders.t5(source, "_3", T5_TOKENS))
    return (*texts, _transformer(source, texts), *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    return latent_transformer.sampling(source, steps=20, guidance_scale=5.0)


def _transformer(source: Source, texts: list[Part]) -> Part:
    config = source.settings("transformer")
    patch = config["patch_size"]
    rows, columns = Axis("height", 4 * patch), Axis("width", 6 * patch)
    states, embeds = zip(*(text.outputs for text in texts[: len(_CLIPS)]), strict=True)
    others = [tensor for text in texts[len(_CLIPS) :] for tensor in text.outputs]
    return Part(
        name="transformer",
        role="denoise",
        network="transformer",
        wrap=partial(Denoiser, reads_t5=bool(others)),
        inputs=(
            Tensor("sample", (BATCH, config["in_channels"], rows, columns)),
            Tensor("timestep", (1,), "float32"),
            *states,
            *embeds,
            *others,
        ),
        outputs=(Tensor("out_sample", (BATCH, config["out_channels"], rows, columns)),),
        cuts=block_cuts.STREAMS,
    )
