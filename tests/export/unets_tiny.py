"""Tiny random pipelines of the UNet families: the classes of the real ones, as little as has every part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from edgediffusion.bundle import Bundle
from edgediffusion.export import export
from edgediffusion.export.families import family_of
from edgediffusion.export.source import Source
from edgediffusion.export.validate import PictureError, Validation, validate
from tests.export.conftest import CAPTIONS, clip_config, small_unet, small_vae
from training import networks

Builder = Callable[[], Any]
CUTS = tuple(f"up_blocks.{block}.resnets.{resnet}" for block in (0, 1) for resnet in (0, 1))  # all that a UNet of these has
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, **options)


def texts() -> dict[str, Any]:
    tokenizer = networks.tokenizer(CAPTIONS, 600)
    return {"text_encoder": CLIPTextModel(clip_config(tokenizer, 32)), "tokenizer": tokenizer}


def stable_diffusion(kind: str, scheduler: Any = None, **unet: Any) -> Any:
    pipeline = getattr(diffusers, kind)
    return pipeline(
        vae=small_vae(),
        unet=diffusers.UNet2DConditionModel.from_config({**small_unet().config, **unet}),
        scheduler=scheduler or ddim(),
        **texts(),
        **NO_CHECKER,
    )


def velocity() -> Any:
    """Stable Diffusion 2.1: v, OpenCLIP's activation, heads by level and linear layers around attention."""
    pipeline = stable_diffusion(
        "StableDiffusionPipeline", ddim(prediction_type="v_prediction"), use_linear_projection=True, upcast_attention=True
    )
    config = clip_config(pipeline.tokenizer, 32)
    config.hidden_act = "gelu"
    return diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "text_encoder": CLIPTextModel(config)}, requires_safety_checker=False
    )


def xl_unet(*, sizes: int = 6, width: int = 48, **options: Any) -> Any:
    """With a level without attention, and two transformer blocks at the deepest one, as the real one has."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": width,
            "attention_head_dim": (2, 4),
            "norm_num_groups": 8,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * sizes + 20,
            **options,
        }
    )


def xl_texts(*, second: bool = False) -> dict[str, Any]:
    tokenizer = networks.tokenizer(CAPTIONS, 600)
    tokenizer.model_max_length = 16  # as many as its encoder has places for
    with_projection = clip_config(tokenizer, 16)
    with_projection.projection_dim = 20
    found = {"text_encoder_2": CLIPTextModelWithProjection(with_projection), "tokenizer_2": tokenizer}
    first = (
        {"text_encoder": None, "tokenizer": None}
        if second
        else {"text_encoder": CLIPTextModel(clip_config(tokenizer, 32)), "tokenizer": tokenizer}
    )
    return {**first, **found}


def euler(**options: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, **options)


def xl(kind: str = "StableDiffusionXLPipeline", scheduler: Any = None, **unet: Any) -> Any:
    pipeline = getattr(diffusers, kind)
    return pipeline(vae=small_vae(), unet=xl_unet(**unet), scheduler=scheduler or euler(timestep_spacing="leading"), **xl_texts())


def refiner() -> Any:
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=small_vae(),
        unet=xl_unet(sizes=5, width=16),
        scheduler=euler(timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        **xl_texts(second=True),
    )


def turbo() -> Any:
    return xl(scheduler=diffusers.EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"))


def controlnet(unet: Any) -> Any:
    """One that gives something: its last layers begin as zeros, and its picture's too."""
    found = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8), load_weights_from_unet=False)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return found


def controlled(pipeline: Any, kind: str, count: int = 1) -> Any:
    nets = [controlnet(pipeline.unet) for _ in range(count)]
    options = {} if "XL" in kind else {"requires_safety_checker": False}
    return getattr(diffusers, kind)(**pipeline.components, controlnet=nets if count > 1 else nets[0], **options)


def plain_unet(**options: Any) -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **options,
    )


def vq_model() -> Any:
    return diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        sample_size=16,
    )


PIPELINES: Mapping[str, Builder] = {
    "velocity": velocity,
    "img2img": lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"),
    "inpaint": lambda: stable_diffusion("StableDiffusionInpaintPipeline", in_channels=9),
    "pixels": lambda: diffusers.DDPMPipeline(plain_unet(in_channels=3, out_channels=3), diffusers.DDPMScheduler()),
    "pixels-ddim": lambda: diffusers.DDIMPipeline(plain_unet(in_channels=1, out_channels=1), diffusers.DDIMScheduler()),
    "latents": lambda: diffusers.LDMPipeline(vq_model(), plain_unet(in_channels=3, out_channels=3), ddim()),
    "xl": xl,
    "xl-refiner": refiner,
    "xl-turbo": turbo,
    "xl-img2img": lambda: xl("StableDiffusionXLImg2ImgPipeline"),
    "xl-inpaint": lambda: xl("StableDiffusionXLInpaintPipeline", in_channels=9),
    "control": lambda: controlled(stable_diffusion("StableDiffusionPipeline"), "StableDiffusionControlNetPipeline"),
    "control-several": lambda: controlled(stable_diffusion("StableDiffusionPipeline"), "StableDiffusionControlNetPipeline", 2),
    "control-img2img": lambda: controlled(stable_diffusion("StableDiffusionPipeline"), "StableDiffusionControlNetImg2ImgPipeline"),
    "xl-control": lambda: controlled(xl(), "StableDiffusionXLControlNetPipeline"),
}


def build(name: str) -> Any:
    torch.manual_seed(sum(map(ord, name)))
    return PIPELINES[name]()


def saved_tiny(name: str, folder: Path) -> Path:
    build(name).save_pretrained(folder)
    return folder


def compared(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, cuts: tuple[str, ...] = ()) -> tuple[Bundle, Validation]:
    """What denoises alone, exported and compared with torch; the other graphs of such a pipeline, and pictures, are compared elsewhere."""
    source = saved_tiny(name, folder / "source")
    family = family_of(Source.open(source))[1]
    parts = family.parts
    monkeypatch.setattr(family, "parts", lambda source: tuple(part for part in parts(source) if part.role in ("denoise", "control")))
    monkeypatch.setattr("edgediffusion.export.validate.takes_prompt", lambda theirs: False)
    monkeypatch.setattr("edgediffusion.export.validate._compare_pictures", lambda prompt, *others: PictureError(prompt, 0.0, 150.0))
    bundle = export(source, folder / "bundle", cuts=cuts)
    return bundle, validate(bundle, source)
