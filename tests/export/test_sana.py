"""Sana: Gemma with an instruction before the prompt, linear attention, and an autoencoder that is sure of its latents."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from transformers_checks import Conformance

from edgediffusion.bundle import Bundle
from edgediffusion.errors import SourceError
from edgediffusion.export import export
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.tokenizers import TextTokenizer


class TestSana(Conformance):
    NAME = "sana"
    SIZE = (32, 64)

    def test_facts(self, bundle: Bundle) -> None:
        facts, text = bundle.sampling, bundle.component("text_encoder").tokenizer
        assert facts is not None
        assert text is not None
        assert (facts.prediction, facts.sampler, facts.schedule.shift, facts.latent_scale) == ("flow", "dpmpp-2m", 3.0, 0.41407)
        assert text.prefix.startswith("Given a user prompt")
        assert (text.length, text.lowercase) == (300, True)
        assert bundle.component("vae_encoder").outputs[0].shape == ("batch", 4, "height", "width")
        assert Bundle.open(bundle.path) == bundle

    def test_a_prompt_is_read_after_its_instruction_and_a_negative_one_is_not(self, bundle: Bundle, source: Path) -> None:
        """diffusers' own way from a text to the ids of its encoder."""
        pipe = diffusers.SanaPipeline.from_pretrained(source)
        asked: list[torch.Tensor] = []
        pipe.text_encoder.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[0]))
        text = "  A red SHIRT "
        with torch.no_grad():
            pipe.encode_prompt(text, True, negative_prompt="Blue", complex_human_instruction=instruction(bundle))
        spec = bundle.component("text_encoder").tokenizer
        assert spec is not None
        ours = TextTokenizer(spec, bundle.path)
        positive, negative = ours([text]), ours(["Blue"], negative=True)
        assert np.array_equal(positive.ids, asked[0].numpy())
        assert np.array_equal(negative.ids, asked[1].numpy())
        assert [text[start:end] for start, end in positive.spans[0] if end > start] == list("A red SHIRT")
        assert positive.cut == ("",)

    def test_weights_of_words_reach_the_tokens_behind_the_instruction(self, bundle: Bundle) -> None:
        pipeline = Pipeline.from_bundle(bundle, threads=1)
        asked = {"num_inference_steps": 1, "height": 32, "width": 32}
        plain = pipeline("a red shirt", **asked).latents
        assert not np.allclose(pipeline("a (red:1.5) shirt", prompt_weights=True, **asked).latents, plain)
        assert np.array_equal(pipeline("a (red:1) shirt", prompt_weights=True, **asked).latents, plain)

    def test_a_picture_becomes_its_latents_without_a_draw(self, bundle: Bundle) -> None:
        """The first noise is then the first thing drawn: at full strength, a picture from nothing."""
        pipeline = Pipeline.from_bundle(bundle, threads=1)
        image = np.random.default_rng(0).random((32, 32, 3))
        asked = {"num_inference_steps": 2, "seed": 4, "height": 32, "width": 32}
        faint, none = pipeline("a bag", image=image, strength=0.5, **asked).latents, pipeline("a bag", **asked).latents
        assert not np.allclose(faint, none)
        repeated = pipeline("a bag", image=image, strength=0.5, **asked).latents
        assert np.array_equal(faint, repeated)

    def test_a_text_encoder_of_another_class_is_refused(self, source: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        for file in source.iterdir():
            (other / file.name).symlink_to(file)
        index = other / "model_index.json"
        content = index.read_text()
        index.unlink()
        index.write_text(content.replace("Gemma2Model", "LlamaModel"))
        with pytest.raises(SourceError, match="'text_encoder' is of a class that is not known. Got: LlamaModel. Allowed: Gemma2Model"):
            export(other, tmp_path / "bundle")


def instruction(bundle: Bundle) -> list[str]:
    tokenizer = bundle.component("text_encoder").tokenizer
    assert tokenizer is not None
    return tokenizer.prefix.split("\n")
