"""UNets of Stable Diffusion that differ from those of the other tests: their graphs alone. Tolerance, and cuts, as in test_unets_xl.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgediffusion.export.families import family_of
from edgediffusion.export.source import Source
from tests.export.unets_tiny import CUTS, compared, saved_tiny


@pytest.mark.parametrize("name", ["velocity", "inpaint", "xl-inpaint"])
def test_graphs_are_torchs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 2.1's linear layers around attention; and nine channels of networks that fill in."""
    bundle, report = compared(name, tmp_path, monkeypatch, cuts=CUTS[1:3])
    assert report.relative_error < 1e-4, report.components
    assert {error.component for error in report.components} == {c.name for c in bundle.components}
    facts = bundle.sampling
    assert facts is not None
    assert facts.prediction == ("v" if name == "velocity" else "epsilon")
    assert bundle.component("unet").inputs[0].shape[1] == (4 if name == "velocity" else 9)


@pytest.mark.parametrize("name", ["img2img", "inpaint"])
def test_the_classes_are_of_the_family(name: str, tmp_path: Path) -> None:
    source = Source.open(saved_tiny(name, tmp_path / "source"))
    found, family = family_of(source)
    assert found == "stable-diffusion"
    assert [part.name for part in family.parts(source)] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert family.sampling(source).schedule.steps_offset == 1
