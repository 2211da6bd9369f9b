"""The graphs of text encoders, role ``encode``: CLIP as Stable Diffusion uses it, and as SDXL does, CLIP with projection, T5, Gemma.

T5 and Gemma fill a text up with a token that no text has, so that a graph can tell from the ids alone where the text ends.
"""

from __future__ import annotations

from functools import partial

import torch

from edgediffusion.export.families import BATCH, Axis, Part, Tensor
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


class MaskedT5Text(torch.nn.Module):
    """``pad`` is the id that texts are filled up with."""

    def __init__(self, network: torch.nn.Module, *, pad: int):
        super().__init__()
        self.network = network
        self.pad = pad

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [b, tokens] to the last hidden states [b, tokens, width] and which of them are of the text, 1 or 0, [b, tokens]."""
        mask = (input_ids != self.pad).to(_dtype(self.network))
        return self.network(input_ids, attention_mask=mask).last_hidden_state, mask


class GemmaText(torch.nn.Module):
    """``pad`` is the id that texts are filled up with, ``tokens`` how many states are given: the first one and the last ones."""

    def __init__(self, network: torch.nn.Module, *, pad: int, tokens: int):
        super().__init__()
        self.network = network
        self.pad, self.tokens = pad, tokens

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [b, n] to the last hidden states [b, tokens, width] and which of them are of the text, 1 or 0, [b, tokens]."""
        dtype = _dtype(self.network)
        mask = (input_ids != self.pad).to(dtype)
        place = torch.arange(input_ids.shape[1])
        seen = (place[None, :] <= place[:, None])[None, None] & (input_ids != self.pad)[:, None, None, :]
        bias = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        kinds = dict.fromkeys(self.network.config.layer_types, bias)  # type: ignore[union-attr, arg-type]
        states = self.network(input_ids, attention_mask=kinds, use_cache=False).last_hidden_state
        last = self.tokens - 1
        return torch.cat([states[:, :1], states[:, -last:]], dim=1), torch.cat([mask[:, :1], mask[:, -last:]], dim=1)


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


def masked_t5(source: Source, tokens: int) -> Part:
    """The one text encoder of a pipeline that tells its denoiser where a text ends; texts are lowered first."""
    source.require_class("text_encoder", ("T5EncoderModel",))
    config = source.config("text_encoder")
    return Part(
        name="text_encoder",
        role="encode",
        network="text_encoder",
        wrap=partial(MaskedT5Text, pad=config["pad_token_id"]),
        inputs=(Tensor("input_ids", (BATCH, tokens), "int64"),),
        outputs=_masked(tokens, config["d_model"]),
        tokenizer="tokenizer",
        feeds={"last_hidden_state": "encoder_hidden_states"},
        lowercase=True,
    )


def gemma(source: Source, tokens: int, prefix: str) -> Part:
    """A language model as the one text encoder. ``prefix`` is what it is told before a prompt, but before no negative one.

    Raises:
        SourceError: it is of another class, or looks back less far than a text is long.
    """
    source.require_class("text_encoder", ("Gemma2Model",))
    config = source.config("text_encoder")
    return Part(
        name="text_encoder",
        role="encode",
        network="text_encoder",
        wrap=partial(GemmaText, pad=config["pad_token_id"], tokens=tokens),
        inputs=(Tensor("input_ids", (BATCH, Axis("tokens", tokens)), "int64"),),
        outputs=_masked(tokens, config["hidden_size"]),
        tokenizer="tokenizer",
        feeds={"last_hidden_state": "encoder_hidden_states"},
        lowercase=True,
        prefix=prefix,
    )


def _masked(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    return Tensor("last_hidden_state", (BATCH, tokens, width)), Tensor("encoder_attention_mask", (BATCH, tokens))


def _dtype(network: torch.nn.Module) -> torch.dtype:
    """Of what a network computes in: that of its norms, which is never kept apart from the states that they normalize."""
    return next(network.parameters()).dtype


def clip_tokens(source: Source, name: str) -> int:
    return int(source.config(name)["max_position_embeddings"])
