"""The shapes of published pipelines, as their configuration files have them, and folders of that shape without their weights.

A pipeline is its class and its components: library, class, configuration. ``make`` writes what diffusers' save_pretrained would,
with weights that are either random or holes in the file: a sparse file of 24 GB takes a few blocks of the disk.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _report import REFERENCE

Config = dict[str, Any]
Component = tuple[str, str, Config]
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
SHARD_BYTES = 10_000_000_000
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Shape:
    """``dtypes`` are those of the published files, F32 where none is said; ``settings`` further entries of model_index.json."""

    pipeline: str
    components: Mapping[str, Component]
    dtypes: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)


def clip_l() -> Component:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
    return ("transformers", "CLIPTextModel", {**sizes, "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu"})


def clip_g() -> Component:
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
    return (
        "transformers",
        "CLIPTextModelWithProjection",
        {**sizes, "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "gelu"},
    )


def t5_xxl() -> Component:
    sizes = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    return ("transformers", "T5EncoderModel", {**sizes, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})


def autoencoder(channels: int = 4, scale: float = 0.18215, **further: Any) -> Component:
    widths = [128, 256, 512, 512]
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2}
    return (
        "diffusers",
        "AutoencoderKL",
        {**blocks, "block_out_channels": widths, "latent_channels": channels, "scaling_factor": scale, **further},
    )


def ddim() -> Component:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return ("diffusers", "DDIMScheduler", {**betas, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1})


def dpm_solver() -> Component:
    return ("diffusers", "DPMSolverMultistepScheduler", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02})


def flow(shift: float = 3.0, **further: Any) -> Component:
    return ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": shift, **further})


def unet_sd15() -> Config:
    return {
        "sample_size": 64,
        "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "in_channels": 4,
        "out_channels": 4,
    }


def unet_sd21() -> Config:
    """Of the 768-v checkpoint: v-prediction, heads by level."""
    return {
        **unet_sd15(),
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    }


def unet_sdxl() -> Config:
    return {
        "sample_size": 128,
        "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
        "in_channels": 4,
        "out_channels": 4,
    }


def unet_sdxl_refiner() -> Config:
    return {
        **unet_sdxl(),
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "attention_head_dim": [6, 12, 24, 24],
        "transformer_layers_per_block": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
    }


def controlnet(unet: Config) -> Config:
    """The ControlNet of a UNet: its way down and its middle, and layers that look at a picture."""
    of_the_unet = {key: value for key, value in unet.items() if key not in ("sample_size", "out_channels", "up_block_types")}
    return {**of_the_unet, "conditioning_embedding_out_channels": [16, 32, 96, 256]}


def transformer_sd35_medium() -> Config:
    sizes = {
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
    }
    latents = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 384}
    return {**sizes, **latents, "pooled_projection_dim": 2048, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}


def transformer_flux_dev() -> Config:
    sizes = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096}
    return {
        **sizes,
        "patch_size": 1,
        "in_channels": 64,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }


def transformer_dit_xl_2() -> Config:
    sizes = {
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
    }
    return {**sizes, "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 8, "activation_fn": "gelu-approximate"}


def transformer_pixart_alpha() -> Config:
    sizes = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 4096}
    latents = {"sample_size": 128, "patch_size": 2, "in_channels": 4, "out_channels": 8, "use_additional_conditions": True}
    return {**sizes, **latents, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "activation_fn": "gelu-approximate"}


def transformer_sana() -> Config:
    sizes = {"num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32, "caption_channels": 2304, "mlp_ratio": 2.5}
    cross = {"num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240}
    return {**sizes, **cross, "sample_size": 32, "patch_size": 1, "in_channels": 32, "out_channels": 32}


def _diffusers(kind: str, config: Config) -> Component:
    return ("diffusers", kind, config)


def _sd15() -> Shape:
    networks = {"unet": _diffusers("UNet2DConditionModel", unet_sd15()), "vae": autoencoder(), "text_encoder": clip_l()}
    return Shape("StableDiffusionPipeline", {**networks, "scheduler": ddim()}, {})


def _sdxl() -> Shape:
    texts = {"text_encoder": clip_l(), "text_encoder_2": clip_g()}
    vae = autoencoder(scale=0.13025, force_upcast=True)
    unet = _diffusers("UNet2DConditionModel", unet_sdxl())
    return Shape("StableDiffusionXLPipeline", {"unet": unet, "vae": vae, **texts, "scheduler": ddim()}, {})


def open_clip_h() -> Component:
    """The text encoder of Stable Diffusion 2: OpenCLIP's ViT-H without its last layer."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "projection_dim": 512}
    return ("transformers", "CLIPTextModel", {**sizes, "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "gelu"})


def _sd21() -> Shape:
    library, kind, plain = ddim()
    networks = {"unet": _diffusers("UNet2DConditionModel", unet_sd21()), "vae": autoencoder(), "text_encoder": open_clip_h()}
    scheduler = (library, kind, {**plain, "prediction_type": "v_prediction"})
    return Shape("StableDiffusionPipeline", {**networks, "scheduler": scheduler}, {})


def _sdxl_refiner() -> Shape:
    vae = autoencoder(scale=0.13025, force_upcast=True)
    networks = {"unet": _diffusers("UNet2DConditionModel", unet_sdxl_refiner()), "vae": vae, "text_encoder_2": clip_g()}
    settings = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    return Shape("StableDiffusionXLImg2ImgPipeline", {**networks, "scheduler": ddim()}, {}, settings)


def _with_controlnet(shape: Shape, pipeline: str) -> Shape:
    network = _diffusers("ControlNetModel", controlnet(shape.components["unet"][2]))
    return replace(shape, pipeline=pipeline, components={**shape.components, "controlnet": network})


def _sd35() -> Shape:
    first = ("transformers", "CLIPTextModelWithProjection", clip_l()[2])
    texts = {"text_encoder": first, "text_encoder_2": clip_g(), "text_encoder_3": t5_xxl()}
    vae = autoencoder(16, 1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    transformer = _diffusers("SD3Transformer2DModel", transformer_sd35_medium())
    components = {"transformer": transformer, "vae": vae, **texts, "scheduler": flow()}
    return Shape("StableDiffusion3Pipeline", components, {"transformer": "BF16"})


def _flux() -> Shape:
    vae = autoencoder(16, 0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    moved = flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    transformer = _diffusers("FluxTransformer2DModel", transformer_flux_dev())
    components = {"transformer": transformer, "vae": vae, "text_encoder": clip_l(), "text_encoder_2": t5_xxl(), "scheduler": moved}
    return Shape("FluxPipeline", components, {"transformer": "BF16", "text_encoder_2": "BF16"})


def _dit() -> Shape:
    transformer = _diffusers("DiTTransformer2DModel", transformer_dit_xl_2())
    scheduler = ("diffusers", "DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False})
    return Shape("DiTPipeline", {"transformer": transformer, "vae": autoencoder(), "scheduler": scheduler}, {})


def _pixart() -> Shape:
    transformer = _diffusers("PixArtTransformer2DModel", transformer_pixart_alpha())
    components = {"transformer": transformer, "vae": autoencoder(), "text_encoder": t5_xxl(), "scheduler": dpm_solver()}
    return Shape("PixArtAlphaPipeline", components, {})


def _sana() -> Shape:
    transformer = _diffusers("SanaTransformer2DModel", transformer_sana())
    sizes = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
    gemma = ("transformers", "Gemma2Model", {**sizes, "head_dim": 256, "vocab_size": 256000, "pad_token_id": 0})
    vae = _diffusers("AutoencoderDC", {"latent_channels": 32, "scaling_factor": 0.41407})
    components = {"transformer": transformer, "vae": vae, "text_encoder": gemma, "scheduler": flow()}
    return Shape("SanaPipeline", components, {"transformer": "BF16"})


SHAPES = {
    "sd15": _sd15,
    "sd15-controlnet": lambda: _with_controlnet(_sd15(), "StableDiffusionControlNetPipeline"),
    "sd21": _sd21,
    "sdxl": _sdxl,
    "sdxl-refiner": _sdxl_refiner,
    "sdxl-controlnet": lambda: _with_controlnet(_sdxl(), "StableDiffusionXLControlNetPipeline"),
    "sd35-medium": _sd35,
    "flux-dev": _flux,
    "dit-xl-2": _dit,
    "pixart-alpha": _pixart,
    "sana-1.6b": _sana,
}


def make(name: str, folder: Path, networks: tuple[str, ...], *, holes: bool = True) -> dict[str, int]:
    """Write the pipeline ``name`` into the new ``folder``, with weights for ``networks``; returns how many parameters each has."""
    shape = SHAPES[name]()
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": shape.pipeline, "_diffusers_version": "0.35.0", **shape.settings}
    for component, (library, kind, config) in shape.components.items():
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component).mkdir()
        named = {"_class_name": kind} if library == "diffusers" else {"architectures": [kind]}
        (folder / component / file).write_text(json.dumps({**named, **config}), encoding="utf-8")
        index[component] = [library, kind]
        if component.startswith("text_encoder"):
            tokenizer = component.replace("text_encoder", "tokenizer")
            _tokenizer(kind, folder / tokenizer)
            index[tokenizer] = ["transformers", "T5TokenizerFast" if kind.startswith("T5") else "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return {network: _weights(folder, network, shape.dtypes.get(network, "F32"), holes) for network in networks}


def _tokenizer(kind: str, folder: Path) -> None:
    """A small one that works: what it knows is of no matter to a graph."""
    if not kind.startswith("T5"):
        shutil.copytree(REFERENCE / "fashion" / "tokenizer", folder)
        return
    from transformers import T5Tokenizer

    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0), *letters], extra_ids=0).save_pretrained(folder)


def _weights(folder: Path, network: str, dtype: str, holes: bool) -> int:
    import torch

    from edgediffusion.export.skeleton import skeleton
    from edgediffusion.export.source import Source

    source = Source.open(folder)
    bones = skeleton(partial(source.network, network), torch.float32)
    aliases = {name for group in bones.tied for name in sorted(group)[1:]}
    shapes = {name: shape for name, shape in bones.shapes.items() if name not in aliases}
    stem = "diffusion_pytorch_model" if hasattr(bones.network, "config_name") else "model"
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        if filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    files = (
        [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, 1 + len(shards))]
        if len(shards) > 1
        else [f"{stem}.safetensors"]
    )
    for file, tensors in zip(files, shards, strict=True):
        _write(folder / network / file, tensors, dtype, holes)
    if len(shards) > 1:
        places = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
        (folder / network / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8"
        )
    return sum(math.prod(shape) for shape in shapes.values())


def _write(file: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str, holes: bool) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        if holes:
            out.truncate(8 + len(text) + end)
            return
        for left in range(end, 0, -_BLOCK * 4):  # float32 of the size that weights have
            out.write((rng.standard_normal(min(_BLOCK, left // 4), np.float32) * np.float32(0.02)).tobytes())
