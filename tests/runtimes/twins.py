"""diffusers' pipelines and ours around the same tiny random networks, for what starts from a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from edgediffusion.bundle import Component, NoiseSchedule, TensorSpec, Tokenizer
from edgediffusion.runtimes import Pipeline

from .test_against_diffusers import BETAS, SCHEDULERS, TOKENS, WIDTH, as_function, text_encoder, tokenizer
from .tiny import DECODE, ENCODE, SAMPLING, FakeSession, write_bundle

HEIGHT, WIDTH_PIXELS = 16, 24
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {"heun": ("HeunDiscreteScheduler", {}), "unipc": ("UniPCMultistepScheduler", {})}
PROMPTS = ["a red shirt", "a cat"]
LEVEL = 1e-4  # what a pixel may differ: the same float32 networks, on states that differ by rounding; 1/255 is 4e-3


def unet(channels: int) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def picture(seed: int, size: tuple[int, int] = (WIDTH_PIXELS, HEIGHT)) -> Image.Image:
    """A smooth picture in colours: width, height."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int] = (WIDTH_PIXELS, HEIGHT)) -> Image.Image:
    """White, to be painted anew, in the right part and a corner, with a grey edge."""
    levels = np.zeros(size[::-1], np.uint8)
    levels[:, size[0] // 2 :] = 255
    levels[: size[1] // 3, :5] = 200
    levels[:, size[0] // 2 - 1] = 100
    return Image.fromarray(levels)


def vae(channels: int = 4) -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.5,
        sample_size=16,
    ).eval()


def autoencoder_components(channels: int = 4) -> tuple[Component, Component]:
    pixels = TensorSpec("sample", "float32", ("batch", 3, "h2", "w2"))
    latents = TensorSpec("latent_sample", "float32", ("batch", channels, "height", "width"))
    parameters = TensorSpec("latent_parameters", "float32", ("batch", 2 * channels, "height", "width"))
    return (
        replace(DECODE, inputs=(latents,), outputs=(pixels,)),
        Component("vae_encoder", "encode_image", "vae_decoder/model.onnx", (pixels,), (parameters,)),
    )


def autoencoder_sessions(vae: Any, channels: int = 4) -> dict[str, FakeSession]:
    decoder, encoder = autoencoder_components(channels)
    return {
        "vae_decoder": FakeSession.of(decoder, as_function(lambda f: vae.decode(f["latent_sample"]).sample)),
        "vae_encoder": FakeSession.of(encoder, as_function(lambda f: vae.encode(f["sample"]).latent_dist.parameters)),
    }


class Twins:
    """One set of networks. ``channels`` of the UNet's input: 4, or 9 of one that was trained to fill in."""

    def __init__(self, folder: Path, *, channels: int = 4, spacing: str = "leading"):
        self.parts = {"unet": unet(channels), "vae": vae(), "tokenizer": tokenizer()}
        self.parts["text_encoder"] = text_encoder(len(self.parts["tokenizer"]))
        self.spacing = spacing
        self.denoise = Component(
            "unet",
            "denoise",
            "unet/model.onnx",
            (
                TensorSpec("sample", "float32", ("batch", channels, "height", "width")),
                TensorSpec("timestep", "float32", ()),
                TensorSpec("encoder_hidden_states", "float32", ("batch", TOKENS, WIDTH)),
            ),
            (TensorSpec("out_sample", "float32", ("batch", 4, "height", "width")),),
        )
        encode = replace(
            ENCODE,
            tokenizer=Tokenizer("tokenizer/tokenizer.json", TOKENS, self.parts["tokenizer"].pad_token_id),
            outputs=(TensorSpec("last_hidden_state", "float32", ("batch", TOKENS, WIDTH)),),
        )
        schedule = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, spacing=spacing, steps_offset=1, set_alpha_to_one=False)
        sampling = replace(SAMPLING, schedule=schedule, latent_shift=0.0)
        components = (encode, self.denoise, *autoencoder_components())
        self.bundle = replace(write_bundle(folder), components=components, sampling=sampling)
        self.parts["tokenizer"].save_pretrained(folder / "tokenizer")
        parts = self.parts
        self.sessions = {
            "text_encoder": FakeSession.of(encode, as_function(lambda f: parts["text_encoder"](f["input_ids"]).last_hidden_state)),
            "unet": FakeSession.of(self.denoise, as_function(lambda f: parts["unet"](**f).sample)),
            **autoencoder_sessions(parts["vae"]),
        }
        self.ours = Pipeline(self.bundle, self.sessions)

    def theirs(self, family: str, sampler: str) -> Any:
        name, arguments = {**SCHEDULERS, **OTHERS}[sampler]
        scheduler = getattr(diffusers, name)(**BETAS, timestep_spacing=self.spacing, steps_offset=1, **arguments)
        extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = getattr(diffusers, family)(**self.parts, scheduler=scheduler, **extras)
        pipe.set_progress_bar_config(disable=True)
        return pipe
