"""The whole loop against diffusers' pipelines: the same tiny random networks, the same seed, the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import Component, NoiseSchedule, TensorSpec, Tokenizer
from edgediffusion.runtimes import Pipeline

from .tiny import DECODE, ENCODE, SAMPLING, FakeSession, Function, write_bundle

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TOKENS, WIDTH, EMBEDDING = 8, 16, 32
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-3m-sde:source=diffusers": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "sa-solver": ("SASolverScheduler", {}),
}
EARLY = ("ddim", "euler", "euler-ancestral", "dpmpp-2m")  # each with both spacings
PROMPTS = ["a red shirt", "a cat and a very very very big dog of a photo"]


def unet(*, embedded: bool) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
        time_cond_proj_dim=EMBEDDING if embedded else None,
    ).eval()


def vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        sample_size=16,
    ).eval()


def tokenizer() -> Any:
    words = [*"abcdefghijklmnopqrstuvwxyz", *(c + "</w>" for c in "abcdefghijklmnopqrstuvwxyz"), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=TOKENS, pad_token="<|endoftext|>"
    )


def text_encoder(vocabulary: int) -> Any:
    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return transformers.CLIPTextModel(config).eval()


def as_function(call: Any) -> Function:
    def function(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(call({name: torch.from_numpy(array) for name, array in feeds.items()}).numpy())

    return function


class Pair:
    """diffusers' pipeline, and ours around the same torch modules."""

    def __init__(self, folder: Path, *, embedded: bool = False, spacing: str = "leading", prediction: str = "epsilon"):
        self.parts = {"unet": unet(embedded=embedded), "vae": vae(), "tokenizer": tokenizer()}
        self.parts["text_encoder"] = text_encoder(len(self.parts["tokenizer"]))
        self.spacing, self.prediction, self.embedded = spacing, prediction, embedded
        self.ours = self._ours(folder)

    def theirs(self, sampler: str) -> Any:
        name, arguments = SCHEDULERS[sampler]
        kind = {"epsilon": "epsilon", "v": "v_prediction"}[self.prediction]
        scheduler = getattr(diffusers, name)(**BETAS, timestep_spacing=self.spacing, steps_offset=1, prediction_type=kind, **arguments)
        family = diffusers.LatentConsistencyModelPipeline if self.embedded else diffusers.StableDiffusionPipeline
        pipe = family(**self.parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _ours(self, folder: Path) -> Pipeline:
        write_bundle(folder)
        self.parts["tokenizer"].save_pretrained(folder / "tokenizer")
        pad = self.parts["tokenizer"].pad_token_id
        encode = replace(
            ENCODE,
            tokenizer=Tokenizer("tokenizer/tokenizer.json", TOKENS, pad),
            outputs=(TensorSpec("last_hidden_state", "float32", ("batch", TOKENS, WIDTH)),),
        )
        conditions = (TensorSpec("timestep_cond", "float32", ("batch", EMBEDDING)),) if self.embedded else ()
        latent = ("batch", 4, "height", "width")
        denoise = Component(
            "unet",
            "denoise",
            "unet/model.onnx",
            (
                TensorSpec("sample", "float32", latent),
                TensorSpec("timestep", "float32", ()),
                TensorSpec("encoder_hidden_states", "float32", ("batch", TOKENS, WIDTH)),
                *conditions,
            ),
            (TensorSpec("out_sample", "float32", latent),),
        )
        decode = replace(DECODE, outputs=(TensorSpec("sample", "float32", ("batch", 3, "h2", "w2")),))
        sampling = replace(
            SAMPLING,
            schedule=NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, spacing=self.spacing, steps_offset=1, set_alpha_to_one=False),
            prediction=self.prediction,
            latent_shift=0.0,
            guidance="embedded" if self.embedded else "classifier-free",
            guidance_width=EMBEDDING if self.embedded else 0,
        )
        bundle = replace(write_bundle(folder / "inner"), path=folder, components=(encode, denoise, decode), sampling=sampling)
        parts = self.parts
        sessions = {
            "text_encoder": FakeSession.of(encode, as_function(lambda f: parts["text_encoder"](f["input_ids"]).last_hidden_state)),
            "unet": FakeSession.of(denoise, as_function(lambda f: parts["unet"](**f).sample)),
            "vae_decoder": FakeSession.of(decode, as_function(lambda f: parts["vae"].decode(f["latent_sample"]).sample)),
        }
        return Pipeline(bundle, sessions)


def assert_same_picture(pair: Pair, sampler: str, **arguments: Any) -> None:
    prompts = arguments.pop("prompt", PROMPTS)
    generator = torch.Generator().manual_seed(5)
    images = arguments.pop("num_images", 1)
    theirs = pair.theirs(sampler)(
        prompts, height=16, width=24, generator=generator, output_type="np", num_images_per_prompt=images, **arguments
    )
    ours = pair.ours(prompts, height=16, width=24, seed=5, sampler=sampler, num_images=images, **arguments)
    # The same float32 network, called on states that differ by rounding (1e-5 by tests/runtimes/test_samplers.py), in
    # batches of another size for the encoder and the decoder; a level of an 8-bit picture is 4e-3.
    np.testing.assert_allclose(ours.pixels, theirs.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sampler", EARLY)
def test_stable_diffusion(tmp_path: Path, sampler: str, spacing: str) -> None:
    pair = Pair(tmp_path / "bundle", spacing=spacing)
    assert_same_picture(pair, sampler, num_inference_steps=6, guidance_scale=5.0, negative_prompt=["blue", "dog"])


def test_stable_diffusion_with_every_other_solver(tmp_path: Path) -> None:
    """One pair of pipelines for all: how often the loop calls the network, and whose noise is drawn when."""
    pair = Pair(tmp_path / "bundle")
    for sampler in SCHEDULERS:
        if sampler not in (*EARLY, "lcm"):
            assert_same_picture(pair, sampler, num_inference_steps=4, guidance_scale=3.0)


def test_stable_diffusion_with_v_prediction_and_several_images(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "bundle", spacing="trailing", prediction="v")
    assert_same_picture(pair, "ddim", num_inference_steps=4, guidance_scale=3.0, num_images=2)


def test_stable_diffusion_without_guidance(tmp_path: Path) -> None:
    assert_same_picture(Pair(tmp_path / "bundle"), "euler", num_inference_steps=3, guidance_scale=1.0)


@pytest.mark.parametrize("steps", [1, 4])
def test_latent_consistency(tmp_path: Path, steps: int) -> None:
    assert_same_picture(Pair(tmp_path / "bundle", embedded=True), "lcm", num_inference_steps=steps, guidance_scale=8.5)
