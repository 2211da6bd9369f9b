"""The graphs of text encoders, role ``encode``: CLIP as Stable Diffusion uses it, and as SDXL does, CLIP with projection, T5, Gemma.

T5 and Gemma fill a text up with a token that no text has, so that a graph can tell from the ids alone where the text ends.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
        """ids [b, tokens] to the last hidden states, what stands for the whole text [b, width], and the states before each layer.

        The embedding comes first where there is a projection: other tools tell the two encoders apart by their first output.
        """
        found = self.network(input_ids, output_hidden_states=True)
        if hasattr(found, "text_embeds"):
            return found.text_embeds, found.last_hidden_state, *found.hidden_states[:-1]
        return found.last_hidden_state, found.pooler_output, *found.hidden_states[:-1]


class T5Text(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids [b, tokens] to the last hidden states [b, tokens, width]."""
        return self.network(input_ids).last_hidden_state  # type: ignore[no-any-return]


class MaskedT5Text(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [b, tokens] to the last hidden states [b, tokens, width] and which of them are of the text, 1 or 0, [b, tokens]."""
        mask = _of_text(self.network, input_ids).to(_dtype(self.network))
        return self.network(input_ids, attention_mask=mask).last_hidden_state, mask


class GemmaText(torch.nn.Module):
    """``tokens`` is how many states are given: the first one and the last ones."""

    def __init__(self, network: torch.nn.Module, *, tokens: int):
        super().__init__()
        self.network = network
        self.tokens = tokens

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [b, n] to the last hidden states [b, tokens, width] and which of them are of the text, 1 or 0, [b, tokens]."""
        dtype, of_text = _dtype(self.network), _of_text(self.network, input_ids)
        mask = of_text.to(dtype)
        place = torch.arange(input_ids.shape[1])
        back = place[:, None] - place[None, :]
        config: Any = self.network.config
        near = {"full_attention": back >= 0, "sliding_attention": (back >= 0) & (back < config.sliding_window)}
        seen = {kind: near[kind][None, None] & of_text[:, None, None, :] for kind in config.layer_types}
        kinds = {kind: torch.where(where, 0.0, torch.finfo(dtype).min).to(dtype) for kind, where in seen.items()}
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
    last = Tensor("last_hidden_state", (BATCH, tokens, width))
    states = [Tensor(f"hidden_states.{layer}", last.axes) for layer in range(layers)]
    if kind == "CLIPTextModelWithProjection":
        told = (Tensor("text_embeds", (BATCH, config["projection_dim"])), last)
    else:
        told = (last, Tensor("pooler_output", (BATCH, width)))
    return Part(
        name=name,
        role="encode",
        network=name,
        wrap=ClipHidden,
        inputs=(Tensor("input_ids", (BATCH, tokens), "int64"),),
        outputs=(*told, *states),
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
        wrap=MaskedT5Text,
        inputs=(Tensor("input_ids", (BATCH, tokens), "int64"),),
        outputs=_masked(tokens, config["d_model"]),
        tokenizer="tokenizer",
        feeds={"last_hidden_state": "encoder_hidden_states"},
        lowercase=True,
    )


def gemma(source: Source, tokens: int, prefix: str) -> Part:
    """A language model as the one text encoder. ``prefix`` is what it is told before a prompt, but before no negative one.

    Raises:
        SourceError: it is of another class.
    """
    source.require_class("text_encoder", ("Gemma2Model",))
    config = source.config("text_encoder")
    return Part(
        name="text_encoder",
        role="encode",
        network="text_encoder",
        wrap=partial(GemmaText, tokens=tokens),
        inputs=(Tensor("input_ids", (BATCH, Axis("tokens", tokens)), "int64"),),
        outputs=_masked(tokens, config["hidden_size"]),
        tokenizer="tokenizer",
        feeds={"last_hidden_state": "encoder_hidden_states"},
        lowercase=True,
        prefix=prefix,
    )


def _masked(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    return Tensor("last_hidden_state", (BATCH, tokens, width)), Tensor("encoder_attention_mask", (BATCH, tokens))


def _of_text(network: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """[b, tokens]: False where the id is the one that texts are filled up with."""
    config: Any = network.config
    return torch.ne(input_ids, config.pad_token_id)


def _dtype(network: torch.nn.Module) -> torch.dtype:
    """Of what a network computes in: that of its norms, which is never kept apart from the states that they normalize."""
    return next(network.parameters()).dtype


def clip_tokens(source: Source, name: str) -> int:
    return int(source.config(name)["max_position_embeddings"])
