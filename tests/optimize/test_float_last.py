"""The last steps by the float network: a denoiser of their own in the bundle."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgediffusion
from edgediffusion.errors import ArgumentError
from edgediffusion.export import export
from edgediffusion.optimize import calibrate, quantize
from edgediffusion.optimize.recipe import Recipe, load_recipe, with_preset
from edgediffusion.optimize.stages import without_last
from edgediffusion.profiles.quality import psnr_db
from edgediffusion.runtimes import Pipeline

FASHION = Path(edgediffusion.__file__).parent / "reference" / "fashion"
STEPS = 4


def _items(steps):
    return [(step, {"timestep": np.float32([1000 - 100 * step])}) for step in steps]


def test_the_last_steps_begin_between_two_items():
    before, below = without_last(_items(range(5)), 5, 2)
    assert [step for step, _ in before] == [0, 1, 2]
    assert below == (750.0,)
    assert without_last(_items(range(5)), 5, 0)[1] == ()


@pytest.mark.parametrize(("steps", "place"), [(range(3), "in"), (range(4, 6), "before")])
def test_steps_without_items_are_refused(steps, place):
    with pytest.raises(ArgumentError, match=f"no calibration items {place} them"):
        without_last(_items(steps), 6, 2)


@pytest.mark.parametrize("value", ["-1", "9", "true", '"1"'])
def test_bad_numbers_are_refused(tmp_path, value):
    file = tmp_path / "mine.toml"
    file.write_text(f'weights = "int8"\nactivations = "int8"\nfloat_last = {value}')
    with pytest.raises(ArgumentError, match="float steps"):
        load_recipe(str(file))


def test_the_float_network_draws_the_last_step(tmp_path):
    exported = export(FASHION, tmp_path / "float")
    recipe = replace(with_preset(Recipe("mine", "int8", "int8"), "ends"), float_last=1)
    drawn = {}
    for last in (0, 1):
        state = calibrate(exported, output=tmp_path / f"state{last}", samples=8, steps=STEPS, recipe=replace(recipe, float_last=last))
        bundle = quantize(exported, state, tmp_path / f"int8-{last}")
        drawn[last] = Pipeline.from_bundle(bundle)("a photo of a bag", num_inference_steps=STEPS, seed=3).pixels[0]
    first, second = bundle.with_role("denoise")
    assert (first.below, second.name, second.below) == (None, "unet_2", state.below[0])
    assert (bundle.path / second.model).read_bytes() == (exported.path / "unet" / "model.onnx").read_bytes()
    assert not (exported.path / "unet" / "quantized.safetensors").exists()
    expected = Pipeline.from_bundle(exported)("a photo of a bag", num_inference_steps=STEPS, seed=3).pixels[0]
    assert psnr_db(drawn[1], expected) > psnr_db(drawn[0], expected)
