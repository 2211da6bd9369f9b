"""Stable Diffusion XL: its graphs are torch's, its pictures diffusers', whole and in parts; and what does not fit is refused.

Tolerances as in test_bundles.py. Cut graphs are compared with what torch's whole network gives for the same inputs, so each
row of a shallow graph says shallow(x, feature of whole(x)) == whole(x).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgediffusion.bundle import SIZES
from edgediffusion.errors import SourceError
from edgediffusion.export import export
from edgediffusion.export.families import family_of, stable_diffusion_xl
from edgediffusion.export.source import Source
from edgediffusion.export.validate import validate
from tests.export.unets_tiny import CUTS, saved_tiny


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny("xl", tmp_path_factory.mktemp("xl") / "source")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny("xl-refiner", tmp_path_factory.mktemp("refiner") / "source")


def test_base(xl: Path, tmp_path: Path) -> None:
    """Without a negative prompt the unconditional row is zeros, as diffusers' is; sizes and both encoders are conditions."""
    bundle = export(xl, tmp_path / "bundle", cuts=CUTS)
    report = validate(bundle, xl, prompts=("a red shirt",), steps=4, seed=3)
    assert report.relative_error < 1e-4, report.components
    assert report.largest_255 < 2, report.pictures
    assert report.psnr_db > 60
    compared = {error.component for error in report.components}
    assert {c.name for c in bundle.components} == compared
    assert len([name for name in compared if "shallow" in name]) == len(CUTS)
    facts = bundle.sampling
    assert facts is not None
    assert (facts.time_ids, facts.zero_unconditional, facts.sampler) == (SIZES, True, "euler")


def test_names_are_those_of_other_tools(xl: Path) -> None:
    parts = {part.name: part for part in stable_diffusion_xl.parts(Source.open(xl))}
    assert [tensor.name for tensor in parts["unet"].inputs] == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert [tensor.name for tensor in parts["text_encoder"].outputs] == [
        "last_hidden_state",
        "pooler_output",
        "hidden_states.0",
        "hidden_states.1",
    ]
    assert parts["text_encoder_2"].outputs[0].name == "text_embeds"  # by which diffusers' pipeline tells it from the first one
    assert parts["text_encoder"].feeds == parts["text_encoder_2"].feeds == {"hidden_states.1": "encoder_hidden_states"}


def test_refiner(refiner: Path, tmp_path: Path) -> None:
    """One encoder, and a score in place of a size. Its pipeline starts from a picture."""
    bundle = export(refiner, tmp_path / "bundle")
    report = validate(bundle, refiner, prompts=("a red shirt",), steps=4, seed=3)
    assert report.relative_error < 1e-4, report.components
    assert report.largest_255 < 2, report.pictures
    facts = bundle.sampling
    assert facts is not None
    assert (facts.time_ids, facts.zero_unconditional) == ((*SIZES[:4], "aesthetic_score"), False)


@pytest.mark.parametrize(("name", "steps", "scale"), [("xl-turbo", 4, 1.0), ("xl-img2img", 20, 5.0), ("xl-inpaint", 20, 5.0)])
def test_what_other_pipelines_are(name: str, steps: int, scale: float, tmp_path: Path) -> None:
    """They have the same graphs, but for the channels of one that fills in; few-step checkpoints are known by their scheduler."""
    source = Source.open(saved_tiny(name, tmp_path / "source"))
    assert family_of(source)[0] == "stable-diffusion-xl"
    facts, parts = stable_diffusion_xl.sampling(source), stable_diffusion_xl.parts(source)
    assert (facts.steps, facts.guidance_scale) == (steps, scale)
    (unet,) = (part for part in parts if part.role == "denoise")
    assert unet.inputs[0].axes[1] == (9 if name == "xl-inpaint" else 4)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"requires_aesthetics_score": True}, "another number of sizes. Got: 6. Allowed: 5: .*aesthetic_score"),
        ("text_encoder_2/config.json", {"hidden_size": 24}, r"do not fit its UNet. Got: states of 32 \+ 24 numbers. Allowed: 48 together"),
        (
            "unet/config.json",
            {"addition_embed_type": "image"},
            "does not have. Got: addition_embed_type image. Allowed: addition_embed_type",
        ),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "in its own way. Got: latents_mean"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "Got: class_embed_type timestep"),
        ("model_index.json", {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "'text_encoder_2' is of a class that is not known"),
    ],
)
def test_refuses(xl: Path, tmp_path: Path, file: str, change: dict[str, object], message: str) -> None:
    source = Path(shutil.copytree(xl, tmp_path / "source"))
    content = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps({**content, **change}))
    with pytest.raises(SourceError, match=message):
        export(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
