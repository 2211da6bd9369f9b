"""UNets that draw from nothing, of pixels and of a VQModel's latents. Tolerances, and what cuts are compared with: test_unets_xl.py."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from edgediffusion.errors import SourceError
from edgediffusion.export import export
from edgediffusion.export.families import latent_unconditional, unconditional
from edgediffusion.export.source import Source
from edgediffusion.export.validate import validate
from edgediffusion.runtimes import Pipeline
from tests.export.unets_tiny import CUTS, plain_unet, saved_tiny


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_graphs_are_torchs_and_pictures_diffusers(name: str, tmp_path: Path) -> None:
    """DDPM with its estimates clipped, as diffusers does; and a decoder with a codebook."""
    source = saved_tiny(name, tmp_path / "source")
    bundle = export(source, tmp_path / "bundle", cuts=CUTS)
    report = validate(bundle, source, steps=4, seed=3)
    assert report.relative_error < 1e-4, report.components
    assert report.largest_255 < 2, report.pictures
    assert len(report.pictures) == 1  # there are no prompts
    assert {error.component for error in report.components} == {c.name for c in bundle.components}
    facts = bundle.sampling
    assert facts is not None
    assert (facts.clip, facts.guidance) == (1.0 if name == "pixels" else None, "none")


def test_classes(tmp_path: Path) -> None:
    """diffusers has no pipeline that asks for them: the same loop with its scheduler."""
    torch.manual_seed(0)
    pipeline = diffusers.DDIMPipeline(plain_unet(in_channels=1, out_channels=1, num_class_embeds=5), diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "source")
    bundle = export(tmp_path / "source", tmp_path / "bundle")
    mine = Pipeline.from_bundle(bundle, threads=1)(class_labels=[3, 4], seed=7, num_inference_steps=4)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    pipeline.scheduler.set_timesteps(4)
    for t in pipeline.scheduler.timesteps:
        with torch.no_grad():
            noise = pipeline.unet(x, t, class_labels=torch.tensor([3, 4])).sample
        x = pipeline.scheduler.step(noise, t, x, use_clipped_model_output=True).prev_sample
    np.testing.assert_allclose(mine.latents, x.numpy(), rtol=0, atol=1e-4)  # float32 networks on states that differ by rounding


def test_a_setting_that_clips_latents_is_refused_where_the_family_does_not(tmp_path: Path) -> None:
    source = saved_tiny("img2img", tmp_path / "source")
    file = source / "scheduler" / "scheduler_config.json"
    index = source / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "clip_sample": True}))
    with pytest.raises(SourceError, match="do not follow: clip_sample. Got: True"):
        export(source, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("unet", {"out_channels": 6}, "predicts or takes something that is not known. Got: 3 channels in, 6 out"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type timestep"),
        ("vqvae", {"lookup_from_codebook": True}, "numbers of codes"),
    ],
)
def test_refuses(component: str, change: dict[str, object], message: str, tmp_path: Path) -> None:
    source = saved_tiny("latents", tmp_path / "source")
    file = source / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SourceError, match=message):
        latent_unconditional.parts(Source.open(source))


def test_a_component_that_such_a_pipeline_does_not_have(tmp_path: Path) -> None:
    source = saved_tiny("pixels", tmp_path / "source")
    index = source / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "movq": ["diffusers", "VQModel"]}))
    with pytest.raises(SourceError, match=r"not known. Got: movq \(VQModel\). Allowed: scheduler, unet"):
        unconditional.parts(Source.open(source))
