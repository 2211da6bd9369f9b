"""Autoencoders that are sure of their latents: AutoencoderTiny here, AutoencoderDC in test_sana.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers_tiny
from transformers_checks import of_size

from edgediffusion.bundle import Bundle
from edgediffusion.errors import SourceError
from edgediffusion.export import autoencoder, export
from edgediffusion.export.families import flux
from edgediffusion.export.source import Source
from edgediffusion.export.validate import validate
from edgediffusion.runtimes.autoencoder import Gaussian
from edgediffusion.runtimes.noise import TorchNoise


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transformers_tiny.write("flux-tiny-autoencoder", tmp_path_factory.mktemp("pipeline") / "source")


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(source, tmp_path_factory.mktemp("bundle") / "bundle")


def test_a_picture_from_a_picture_equals_diffusers(source: Path, bundle: Bundle) -> None:
    """FluxImg2ImgPipeline encodes a picture without a draw: the same noise is then the same picture."""
    report = validate(of_size(bundle, 16, 24), source, prompts=("a red shirt",), steps=4, seed=3)
    assert report.relative_error < 1e-4, report.components
    assert report.largest_255 < 2, report.pictures
    assert {found.shape[1] for found in report.components if found.component == "vae_encoder"} == {4}


def test_facts(source: Path, bundle: Bundle) -> None:
    assert autoencoder.facts(Source.open(source)) == autoencoder.Latents(channels=4, downsampling=2, scale=1.0, shift=0.0)
    assert [c.outputs[0].name for c in bundle.components if c.role == "encode_image"] == ["latents"]


def test_an_unknown_autoencoder_is_refused_by_its_name(source: Path) -> None:
    index = {**Source.open(source).index, "vae": ["diffusers", "AsymmetricAutoencoderKL"]}
    with pytest.raises(SourceError, match="AsymmetricAutoencoderKL. Allowed: AutoencoderKL, AutoencoderTiny, AutoencoderDC"):
        flux.parts(Source(source, index))


def test_what_a_file_is_silent_about_is_as_its_class_has_it(source: Path, tmp_path: Path) -> None:
    silent = Path(shutil.copytree(source, tmp_path / "silent"))
    for network in ("vae", "transformer"):
        file = silent / network / "config.json"
        config = json.loads(file.read_text())
        file.write_text(
            json.dumps({key: value for key, value in config.items() if key not in ("scaling_factor", "in_channels", "patch_size")})
        )
    facts = flux.sampling(Source.open(silent))
    assert (facts.latent_scale, facts.size_multiple) == (1.0, 4)
    assert flux.parts(Source.open(silent))[-1].inputs[0].axes[1] == 3


def test_latents_without_a_deviation_take_no_number_from_the_noise() -> None:
    mean = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    noise, untouched = TorchNoise(3), TorchNoise(3)
    assert np.array_equal(Gaussian(mean).draw(noise), mean)
    assert np.array_equal(Gaussian(mean).of(np.array([1, 1])).mean, mean[[1, 1]])
    assert np.array_equal(noise.normal((3,)), untouched.normal((3,)))
    drawn = Gaussian(mean, np.ones_like(mean)).of(np.array([1])).draw(noise)
    assert torch.from_numpy(drawn).isfinite().all()
    assert not np.array_equal(drawn, mean[1:])
