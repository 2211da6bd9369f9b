"""Stable Diffusion XL (Podell et al. 2023, 2307.01952): the base, its refiner, and few-step checkpoints made from it.

A UNet with cross-attention to the states of two CLIP encoders, side by side, and conditioned on the second one's embedding
of the text, ``text_embeds``, and on sizes, ``time_ids``. The refiner has the second encoder alone, and is told how good
its picture shall look in place of the size that it shall have.
"""

from __future__ import annotations

from dataclasses import replace

from edgediffusion.bundle import SIZES, Sampling
from edgediffusion.errors import SourceError
from edgediffusion.export import autoencoder, conditional_unet, text_encoders
from edgediffusion.export.families import BATCH, Part, Tensor, check_components
from edgediffusion.export.families.stable_diffusion import facts
from edgediffusion.export.schedule import read_scheduler
from edgediffusion.export.source import Source

PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
OPTIONAL = ("image_encoder", "feature_extractor")
_ENCODERS = ("", "_2")
USED = {"unet", "vae", "scheduler", *(f"{kind}{suffix}" for kind in ("text_encoder", "tokenizer") for suffix in _ENCODERS)}


def parts(source: Source) -> tuple[Part, ...]:
    check_components(source, USED, OPTIONAL)
    texts = encoders(source)
    unet = conditional_unet.part(source, tokens=tokens(source), added=added(source))
    return (*texts, unet, *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    known = facts(source, read_scheduler(source))
    return replace(known, time_ids=time_ids(source), zero_unconditional=bool(source.index.get("force_zeros_for_empty_prompt", True)))


def encoders(source: Source) -> tuple[Part, ...]:
    """Both encoders, or the second one of a refiner.

    Raises:
        SourceError: their states together are not what the UNet takes.
    """
    there = [suffix for suffix in _ENCODERS if suffix or "text_encoder" in source.components]
    texts = tuple(text_encoders.clip_hidden(source, suffix) for suffix in there)
    widths = [source.config(part.network)["hidden_size"] for part in texts]
    wanted = source.config("unet")["cross_attention_dim"]
    if sum(widths) != wanted:
        raise SourceError(
            f"The text encoders of this {source.class_name} do not fit its UNet",
            got=f"states of {' + '.join(map(str, widths))} numbers",
            allowed=f"{wanted} together",
            do="Take encoders and UNet from the same pipeline.",
        )
    return texts


def tokens(source: Source) -> int:
    return text_encoders.clip_tokens(source, "text_encoder_2")


def added(source: Source) -> tuple[Tensor, Tensor]:
    width = source.config("text_encoder_2")["projection_dim"]
    return Tensor("text_embeds", (BATCH, width)), Tensor("time_ids", (BATCH, len(time_ids(source))))


def time_ids(source: Source) -> tuple[str, ...]:
    """What the numbers are that the UNet is told.

    Raises:
        SourceError: it was made for another number of them.
    """
    scored = bool(source.index.get("requires_aesthetics_score", False))
    names = (*SIZES[:4], "aesthetic_score") if scored else SIZES
    unet = conditional_unet.checked(source, "text_time")
    taken = unet["projection_class_embeddings_input_dim"] - source.config("text_encoder_2")["projection_dim"]
    if taken != len(names) * unet["addition_time_embed_dim"]:
        raise SourceError(
            f"The UNet of this {source.class_name} takes another number of sizes",
            got=f"{taken / unet['addition_time_embed_dim']:g}",
            allowed=f"{len(names)}: {', '.join(names)}",
            do="Set requires_aesthetics_score in model_index.json to true for a refiner, and to false for others.",
        )
    return names
