"""Tiny random pipelines in diffusers' format, and what is exported from them, each made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from edgediffusion.bundle import Bundle
from edgediffusion.export import export
from edgediffusion.export.families import stable_diffusion as family
from training import networks

CAPTIONS = ["a red shirt", "a pair of blue shoes", "black trousers of wool, worn", "a bag"] * 5
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks that the reference pipelines have, in float32."""
    torch.manual_seed(0)
    tokenizer = networks.tokenizer(CAPTIONS, 600)
    pipeline = StableDiffusionPipeline(
        vae=networks.vae(1),
        text_encoder=networks.text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=networks.unet(8),
        scheduler=networks.diffusion_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(pipeline, tmp_path_factory.mktemp("pipelines") / "stable-diffusion")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As little as makes a Stable Diffusion pipeline; its UNet is in shards, its tokenizer in the old two files."""
    torch.manual_seed(1)
    tokenizer = networks.tokenizer(CAPTIONS, 600)
    pipeline = StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 32)),
        tokenizer=tokenizer,
        unet=small_unet(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = saved(pipeline, tmp_path_factory.mktemp("pipelines") / "small", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    in_two_files(folder / "tokenizer")
    outdated = folder / "scheduler" / "scheduler_config.json"
    outdated.write_text(json.dumps({**json.loads(outdated.read_text()), "steps_offset": 0, "clip_sample": True}))
    return folder


@pytest.fixture(scope="session")
def consistency(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent consistency pipeline in float16 files of the variant ``fp16``; its text encoder has names with a prefix."""
    torch.manual_seed(2)
    tokenizer = networks.tokenizer(CAPTIONS, 600)
    pipeline = LatentConsistencyModelPipeline(
        vae=small_vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 32)),
        tokenizer=tokenizer,
        unet=small_unet(time_cond_proj_dim=16),
        scheduler=LCMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    folder = saved(pipeline, tmp_path_factory.mktemp("pipelines") / "consistency", variant="fp16")
    file = folder / "text_encoder" / "model.fp16.safetensors"
    save_file({f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3 without T5; a patch is one latent pixel."""
    torch.manual_seed(3)
    return saved(stable_diffusion_3(patch=1), tmp_path_factory.mktemp("pipelines") / "flow")


@pytest.fixture(scope="session")
def flow_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3 with T5; a patch is two by two latent pixels."""
    torch.manual_seed(4)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz")]
    config = T5Config(vocab_size=32, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    pipeline = stable_diffusion_3(patch=2, text_encoder_3=T5EncoderModel(config), tokenizer_3=T5Tokenizer(vocab=vocabulary, extra_ids=0))
    return saved(pipeline, tmp_path_factory.mktemp("pipelines") / "flow-t5")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """``exported(source, dtype=...)``: the bundle of a source, the same one for the same arguments."""
    known: dict[object, Bundle] = {}

    def get(source: Path, **arguments: object) -> Bundle:
        key = (source, *sorted(arguments.items()))
        if key not in known:
            known[key] = export(source, tmp_path_factory.mktemp("bundles") / "bundle", **arguments)  # type: ignore[arg-type]
        return known[key]

    return get


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``only("unet")``: from here on the family Stable Diffusion has no other parts; less to trace."""

    def restrict(*names: str) -> None:
        parts = family.parts
        monkeypatch.setattr(family, "parts", lambda source: tuple(part for part in parts(source) if part.name in names))

    return restrict


@pytest.fixture
def broken(small: Path, tmp_path: Path) -> Path:
    """A copy of ``small`` for a test to break."""
    return Path(shutil.copytree(small, tmp_path / "source"))


def saved(pipeline: object, folder: Path, **options: object) -> Path:
    pipeline.save_pretrained(folder, **options)  # type: ignore[attr-defined]
    return folder


def in_two_files(folder: Path) -> None:
    """Take away tokenizer.json, and leave the files that tokenizers had before it."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()


def small_vae(**options: float) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def small_unet(**options: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        **options,
    )


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def stable_diffusion_3(*, patch: int, text_encoder_3: object = None, tokenizer_3: object = None) -> StableDiffusion3Pipeline:
    tokenizer = networks.tokenizer(CAPTIONS, 600)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=patch,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
        dual_attention_layers=(0,) if patch == 2 else (),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(shift_factor=0.05),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, 12)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, 8)),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
