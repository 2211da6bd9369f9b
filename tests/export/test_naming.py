"""Names in checkpoints and names in networks: the five cases of ``naming``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from edgediffusion.errors import SourceError
from edgediffusion.export.checkpoint import Checkpoint, Stored
from edgediffusion.export.naming import match
from edgediffusion.export.skeleton import skeleton


def checkpoint(*names: str) -> Checkpoint:
    return Checkpoint(Path("unet"), {name: Stored(Path("unet/model.safetensors"), "F32", (2,), 0, 8) for name in names})


@pytest.mark.parametrize(
    ("stored", "wanted", "prefix"),
    [
        ("conv.weight", "conv.weight", ""),
        ("text_model.final.weight", "final.weight", "text_model"),
        ("text_model.final.weight", "final.weight", "clip"),
        ("final.weight", "text_model.final.weight", "text_model"),
        ("mid.attentions.0.query.weight", "mid.attentions.0.to_q.weight", ""),
        ("mid.attentions.0.proj_attn.bias", "mid.attentions.0.to_out.0.bias", ""),
    ],
)
def test_spellings(stored: str, wanted: str, prefix: str) -> None:
    held = checkpoint(stored)
    assert match(held, {wanted: (2,)}, prefix=prefix) == {wanted: held.tensors[stored]}


def test_a_tied_tensor_is_found_under_the_other_name() -> None:
    held = checkpoint("shared.weight")
    found = match(held, {"shared.weight": (2,), "embed.weight": (2,)}, tied=[frozenset({"shared.weight", "embed.weight"})])
    assert found["embed.weight"] == held.tensors["shared.weight"]


def test_buffers_that_old_versions_stored_are_no_surplus() -> None:
    match(checkpoint("conv.weight", "text_model.embeddings.position_ids"), {"conv.weight": (2,)})


def test_many_names_are_cut_short() -> None:
    with pytest.raises(SourceError, match=r"Got: a, b, c, d, e and 2 more\."):
        match(checkpoint(), {name: (2,) for name in "abcdefg"})


def test_a_skeleton_has_no_values_and_keeps_its_ties_and_constants() -> None:
    bones = skeleton(lambda: T5EncoderModel(T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)), torch.float16)
    assert frozenset({"shared.weight", "encoder.embed_tokens.weight"}) in bones.tied
    kinds = {name: p.dtype for name, p in bones.network.named_parameters()}
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == torch.float32  # the network itself says so
    assert kinds["shared.weight"] == torch.float16
    assert all(type(p.data).__name__ == "FakeTensor" for p in bones.network.parameters())
