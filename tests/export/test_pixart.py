"""PixArt: alpha's larger network, which reads the size of the picture, and sigma's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers_tiny
from transformers_checks import Conformance, check_whole, part_of

from edgediffusion.bundle import Bundle
from edgediffusion.export.source import Source


class TestAlpha(Conformance):
    NAME = "pixart-alpha"

    def test_facts(self, bundle: Bundle) -> None:
        facts, text = bundle.sampling, bundle.component("text_encoder")
        assert facts is not None
        assert text.tokenizer is not None
        assert (facts.height, facts.size_multiple, facts.latent_channels) == (256, 4, 4)
        assert (text.tokenizer.length, text.tokenizer.lowercase, text.tokenizer.prefix) == (120, True, "")
        assert [spec.name for spec in text.outputs] == ["last_hidden_state", "encoder_attention_mask"]
        assert bundle.component("transformer").outputs[0].shape == ("batch", 4, "height", "width")


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder: Path = transformers_tiny.write("pixart-sigma", tmp_path_factory.mktemp("pipeline") / "sigma")
    return Source.open(folder)


def test_sigma_reads_longer_texts_and_no_size_and_draws_what_diffusers_draws(sigma: Source, tmp_path: Path) -> None:
    bundle = check_whole(sigma.path, tmp_path / "bundle", size=(16, 24))
    facts, text = bundle.sampling, bundle.component("text_encoder")
    assert facts is not None
    assert text.tokenizer is not None
    assert (text.tokenizer.length, facts.latent_scale, facts.latent_shift) == (300, 0.13025, 0.0)
    assert not sigma.network("transformer").use_additional_conditions


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_places_in_float32_are_those_of_diffusers(sigma: Source, size: tuple[int, int]) -> None:
    """Of the size that it was trained for, whose table it has, and of another one."""
    embedding = sigma.load("transformer").pos_embed
    sample = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32))
    with torch.no_grad():
        theirs = embedding(sample)
        ours = part_of(sigma).wrap(sigma.load("transformer")).network.pos_embed(sample)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=1e-6)
