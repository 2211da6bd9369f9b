"""The graphs of text encoders, role ``encode``: CLIP as Stable Diffusion uses it, and as SDXL does, CLIP with projection, T5."""

from __future__ import annotations

import torch

from edgediffusion.export.families import BATCH, Part, Tensor
from edgediffusion.export.source import Source


class ClipText(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [b, tokens] to the last hidden states [b, tokens, width] and the one of the end token [b, width]."""
        found = self.network(input_ids)
        return found.last_hidden_state, found.pooler_output


class ClipTextProjected(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [b, tokens] to the hidden states before the last layer [b, tokens, width] and the text embedding [b, projection]."""
        found = self.network(input_ids, output_hidden_states=True)
        return found.hidden_states[-2], found.text_embeds


class ClipHidden(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """ids [b, tokens] to what stands for the whole text [b, width], the last hidden states and those before each layer."""
        found = self.network(input_ids, output_hidden_states=True)
        whole = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
        return whole, found.last_hidden_state, *found.hidden_states[:-1]


class T5Text(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids [b, tokens] to the last hidden states [b, tokens, width]."""
        return self.network(input_ids).last_hidden_state  # type: ignore[no-any-return]


def clip(source: Source) -> Part:
    """The one text encoder of Stable Diffusion, under the names that other tools expect."""
    source.require_class("text_encoder", ("CLIPTextModel",))
    config = source.config("text_encoder")
    tokens, width = clip_tokens(source, "text_encoder"), config["hidden_size"]
    return Part(
        name="text_encoder",
        role="encode",
        network="text_encoder",
        wrap=ClipText,
        inputs=(Tensor("input_ids", (BATCH, tokens), "int64"),),
        outputs=(Tensor("last_hidden_state", (BATCH, tokens, width)), Tensor("pooler_output", (BATCH, width))),
        tokenizer="tokenizer",
        feeds={"last_hidden_state": "encoder_hidden_states"},
    )


def clip_projected(source: Source, suffix: str) -> Part:
    """One of several CLIP encoders; ``suffix`` is empty or ``_2``, and keeps their conditions apart."""
    name = f"text_encoder{suffix}"
    source.require_class(name, ("CLIPTextModelWithProjection",))
    config = source.config(name)
    tokens = clip_tokens(source, name)
    return Part(
        name=name,
        role="encode",
        network=name,
        wrap=ClipTextProjected,
        inputs=(Tensor("input_ids", (BATCH, tokens), "int64"),),
        outputs=(
            Tensor(f"clip_hidden_states{suffix}", (BATCH, tokens, config["hidden_size"])),
            Tensor(f"clip_text_embeds{suffix}", (BATCH, config["projection_dim"])),
        ),
        tokenizer=f"tokenizer{suffix}",
    )


def clip_hidden(source: Source, suffix: str) -> Part:
    """One of SDXL's two encoders, under the names that other tools expect: they take all hidden states, and pick the last but one.

    The first one is a CLIPTextModel, the second one has a projection. Their states meet in one condition.
    """
    name = f"text_encoder{suffix}"
    kind = source.require_class(name, ("CLIPTextModelWithProjection",) if suffix else ("CLIPTextModel",))
    config = source.config(name)
    tokens, layers = clip_tokens(source, name), config["num_hidden_layers"]
    width = config["hidden_size"]
    whole = ("text_embeds", config["projection_dim"]) if kind == "CLIPTextModelWithProjection" else ("pooler_output", width)
    states = [Tensor(state, (BATCH, tokens, width)) for state in ("last_hidden_state", *(f"hidden_states.{k}" for k in range(layers)))]
    return Part(
        name=name,
        role="encode",
        network=name,
        wrap=ClipHidden,
        inputs=(Tensor("input_ids", (BATCH, tokens), "int64"),),
        outputs=(Tensor(whole[0], (BATCH, whole[1])), *states),
        tokenizer=f"tokenizer{suffix}",
        feeds={states[-1].name: "encoder_hidden_states"},
    )


def t5(source: Source, suffix: str, tokens: int) -> Part:
    name = f"text_encoder{suffix}"
    source.require_class(name, ("T5EncoderModel",))
    return Part(
        name=name,
        role="encode",
        network=name,
        wrap=T5Text,
        inputs=(Tensor("input_ids", (BATCH, tokens), "int64"),),
        outputs=(Tensor("t5_hidden_states", (BATCH, tokens, source.config(name)["d_model"])),),
        tokenizer=f"tokenizer{suffix}",
    )


def clip_tokens(source: Source, name: str) -> int:
    return int(source.config(name)["max_position_embeddings"])
