"""ControlNets: their graphs are torch's, led pictures are diffusers', with caches too; what belongs to another family is refused.

Tolerances, and what cuts are compared with, as in test_unets_xl.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edgediffusion.bundle import SHALLOW_CONTROL, Bundle
from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export import export
from edgediffusion.export.families import stable_diffusion_controlnet
from edgediffusion.export.pictures import smooth_picture
from edgediffusion.export.source import Source
from edgediffusion.export.validate import validate
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.graph import open_components
from tests.export.unets_tiny import CUTS, compared, saved_tiny

SIZE = (16, 16)
DRAW = {"num_inference_steps": 6, "guidance_scale": 3.0, "seed": 3}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """Stable Diffusion with two ControlNets."""
    folder = tmp_path_factory.mktemp("several")
    source = saved_tiny("control-several", folder / "source")
    return export(source, folder / "bundle", cuts=CUTS), source


@pytest.fixture(scope="module")
def led(several: tuple[Bundle, Path]) -> dict[str, object]:
    return {**DRAW, "control_image": [smooth_picture(1, SIZE), smooth_picture(2, SIZE)]}


def test_graphs_are_torchs_and_pictures_diffusers(several: tuple[Bundle, Path]) -> None:
    bundle, source = several
    report = validate(bundle, source, prompts=("a red shirt",), steps=4, seed=3)
    assert report.relative_error < 1e-4, report.components
    assert report.largest_255 < 2, report.pictures
    assert {error.component for error in report.components} == {c.name for c in bundle.components}


def test_guess_mode_draws_what_diffusers_draws(several: tuple[Bundle, Path], led: dict[str, object]) -> None:
    """With guidance and without, its rows together, apart, and through a cache that reuses nothing."""
    bundle, source = several
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(source, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    pipeline = _pipeline(bundle)
    for scale in (3.0, 1.0):
        asked = {"num_inference_steps": 6, "guidance_scale": scale, "guess_mode": True, "controlnet_conditioning_scale": [0.9, 0.4]}
        generator = torch.Generator().manual_seed(3)
        other = theirs("", image=led["control_image"], output_type="np", generator=generator, **asked).images
        for how in ({}, {"guidance_batch": "separate"}, {"cache": "deepcache:interval=1"}):
            found = pipeline("", **{**led, **asked, **how}).pixels
            assert np.abs(found - other).max() < 2 / 255, how
        usual = pipeline("", **{**led, **asked, "guess_mode": False}).pixels
        assert np.abs(usual - other).max() > 5 / 255


def test_a_shallow_graph_takes_the_residuals_of_its_own_skips(several: tuple[Bundle, Path]) -> None:
    bundle, _ = several
    taken = [[s.name for s in bundle.with_cut(cut)["denoise.shallow"].inputs if "residual" in s.name] for cut in CUTS]
    assert [len(names) for names in taken] == [4, 3, 2, 1]
    for cut, names in zip(CUTS, taken, strict=True):
        parts = [c for c in bundle.with_role(SHALLOW_CONTROL) if c.cut == cut]
        assert [part.name.split("_shallow")[0] for part in parts] == ["controlnet", "controlnet_1"]
        assert all([spec.name for spec in part.outputs] == names for part in parts)


def test_a_cache_with_parts_of_controlnets_draws_what_whole_ones_draw(several: tuple[Bundle, Path], led: dict[str, object]) -> None:
    bundle, _ = several
    without = replace(bundle, components=tuple(c for c in bundle.components if c.role != SHALLOW_CONTROL))
    pipeline, whole = (_pipeline(b) for b in (bundle, without))
    uncached = pipeline("a shirt", **led).latents
    assert pipeline("a shirt", **led, cache="deepcache:interval=1").latents.tobytes() == uncached.tobytes()
    for guess in (True, False):
        cached = pipeline("a shirt", **led, guess_mode=guess, cache="deepcache:interval=3")
        other = whole("a shirt", **led, guess_mode=guess, cache="deepcache:interval=3")
        np.testing.assert_allclose(cached.latents, other.latents, rtol=0, atol=1e-5)
    assert np.abs(cached.latents - uncached).max() > 1e-4


def test_rows_apart_and_guidance_in_an_interval_are_led_alike(several: tuple[Bundle, Path], led: dict[str, object]) -> None:
    pipeline = _pipeline(several[0])
    joint = pipeline(["a shirt", "a bag"], **led).latents
    apart = pipeline(["a shirt", "a bag"], **led, guidance_batch="separate").latents
    np.testing.assert_allclose(apart, joint, rtol=0, atol=1e-4)
    never = pipeline(["a shirt", "a bag"], **led, guidance_interval=(1e6, 1e7)).latents
    plain = pipeline(["a shirt", "a bag"], **{**led, "guidance_scale": 1.0}).latents
    np.testing.assert_allclose(never, plain, rtol=0, atol=1e-4)


def test_scales_and_parts_are_diffusers(several: tuple[Bundle, Path], led: dict[str, object]) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionControlNetPipeline

    bundle, source = several
    theirs = StableDiffusionControlNetPipeline.from_pretrained(source, safety_checker=None, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    options = {"controlnet_conditioning_scale": [0.5, 1.5], "control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.6, 1.0]}
    picture = theirs(
        "a shirt",
        image=led["control_image"],
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **options,
    ).images
    mine = _pipeline(bundle)("a shirt", **led, **options).pixels
    assert np.abs(mine - picture).max() * 255 < 2
    assert np.abs(mine - _pipeline(bundle)("a shirt", **led).pixels).max() * 255 > 2


def test_scale_0_needs_no_picture(several: tuple[Bundle, Path], led: dict[str, object]) -> None:
    pipeline = _pipeline(several[0])
    with pytest.raises(ArgumentError, match="led by a picture. Give control_image; controlnet_conditioning_scale 0"):
        pipeline("a shirt", **DRAW)
    nothing = pipeline("a shirt", **DRAW, controlnet_conditioning_scale=0.0).latents
    assert np.array_equal(nothing, pipeline("a shirt", **led, controlnet_conditioning_scale=0.0).latents)
    assert np.abs(nothing - pipeline("a shirt", **led).latents).max() > 1e-3


def test_xl_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, report = compared("xl-control", tmp_path, monkeypatch, cuts=CUTS[-1:])
    assert report.relative_error < 1e-4, report.components
    assert {error.component for error in report.components} == {c.name for c in bundle.components}
    assert [s.name for s in bundle.component("controlnet").inputs][3:] == [
        "text_embeds",
        "time_ids",
        "controlnet_cond",
        "conditioning_scale",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cross_attention_dim": 64},
            "'controlnet' was made for another network.*Got: cross_attention_dim 64. Allowed: cross_attention_dim 32",
        ),
        ({"block_out_channels": [8, 16]}, "Got: block_out_channels"),
        (
            {"addition_embed_type": "text_time"},
            "Got: addition_embed_type text_time. Allowed: addition_embed_type None.*trained for this family",
        ),
        ({"global_pool_conditions": True}, "guess mode alone"),
        ({"conditioning_embedding_out_channels": [8, 8, 8]}, "another size than the autoencoder's. Got: 1/4 of the picture. Allowed: 1/2"),
    ],
)
def test_a_controlnet_of_another_family_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    source = saved_tiny("control", tmp_path / "source")
    file = source / "controlnet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SourceError, match=message):
        stable_diffusion_controlnet.parts(Source.open(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("controlnet_mid_block.weight"), "'controlnet' lacks tensors.*Got: controlnet_mid_block.weight"),
        (lambda tensors: tensors.update(other=tensors["conv_in.bias"]), "'controlnet' has tensors that do not belong.*Got: other"),
        (lambda tensors: tensors.update({"conv_in.bias": tensors["conv_in.bias"][:8]}), r"other shapes.*conv_in.bias \(8,\), not \(16,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[dict[str, np.ndarray]], object], message: str, tmp_path: Path) -> None:
    source = saved_tiny("control", tmp_path / "source")
    file = source / "controlnet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(SourceError, match=message):
        export(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_class_that_is_no_controlnet_known_here(tmp_path: Path) -> None:
    source = saved_tiny("control", tmp_path / "source")
    index = source / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "controlnet": ["diffusers", "ControlNetUnionModel"]}))
    with pytest.raises(
        SourceError, match="'controlnet' is of a class that is not known. Got: ControlNetUnionModel. Allowed: ControlNetModel"
    ):
        stable_diffusion_controlnet.parts(Source.open(source))


def _pipeline(bundle: Bundle) -> Pipeline:
    graphs = open_components(bundle, bundle.components, target=None, threads=1)
    return Pipeline(bundle, {graph.name: graph.session for graph in graphs})
