"""Bundles with ControlNets, which calibration has no pictures for."""

from dataclasses import replace

import pytest

from edgediffusion.errors import ArgumentError
from edgediffusion.optimize import calibrate
from tests.runtimes.tiny import DENOISE, write_bundle


def test_calibration_says_what_to_calibrate_instead(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    led = replace(bundle, components=(*bundle.components, replace(DENOISE, name="controlnet", role="control")))
    with pytest.raises(ArgumentError, match="no pictures to lead.*Got: controlnet. Export the pipeline without it"):
        calibrate(led, output=tmp_path / "state", prompts=["a shirt"], samples=1, steps=1)
    assert not (tmp_path / "state").exists()
