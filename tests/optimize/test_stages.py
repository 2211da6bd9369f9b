"""Stages of sampling: graphs that share weights, each with the activations' ranges of its own steps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgediffusion
from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.export import export
from edgediffusion.optimize import calibrate, fold, quantize
from edgediffusion.optimize.recipe import Recipe, load_recipe, with_preset
from edgediffusion.optimize.stages import boundaries, split_items
from edgediffusion.optimize.state import QuantizationState
from edgediffusion.profiles.quality import psnr_db
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.build import build

FASHION = Path(edgediffusion.__file__).parent / "reference" / "fashion"
PROMPTS = ["a photo of a dress", "a photo of a bag"]
STEPS = 4


def _items(steps):
    return [(step, {"timestep": np.float32([1000 - 100 * step])}) for step in steps]


def test_stages_have_as_many_steps_each():
    parts = split_items(_items(range(6)), 3)
    assert [[step for step, _ in part] for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [[step for step, _ in part] for part in split_items(_items(range(5)), 2)] == [[0, 1, 2], [3, 4]]


def test_boundaries_lie_between_the_steps_on_either_side():
    assert boundaries(_items(range(4)), 2) == (850.0,)
    assert boundaries(_items(range(4)), 1) == ()


def test_a_stage_without_items_is_refused():
    with pytest.raises(ArgumentError, match="no calibration items for one of the 3 stages"):
        split_items(_items([0, 1, 5]), 3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(FASHION, tmp_path_factory.mktemp("float") / "bundle")


@pytest.fixture(scope="module")
def state(tmp_path_factory, exported):
    recipe = replace(with_preset(Recipe("mine", "int8", "int8"), "ends"), stages=2)
    place = tmp_path_factory.mktemp("state") / "state"
    calibrate(exported, output=place, samples=8, steps=STEPS, prompts=PROMPTS, recipe=recipe)
    return QuantizationState.load(place)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, exported, state):
    return quantize(exported, state, tmp_path_factory.mktemp("int8") / "bundle")


def test_the_state_has_ranges_for_each_stage_that_make_up_the_whole(state):
    layer = state.layers["unet/mid_block.resnets.0.conv1"]
    assert len(layer.stages) == 2
    np.testing.assert_array_equal(np.minimum(layer.stages[0].input_low, layer.stages[1].input_low), layer.input_low)
    np.testing.assert_array_equal(np.maximum(layer.stages[0].output_high, layer.stages[1].output_high), layer.output_high)
    assert (layer.stages[0].output_high != layer.stages[1].output_high).any()
    assert len(state.below) == 1


def test_the_graphs_share_their_weights(bundle):
    first, second = (bundle.path / name / "quantized.safetensors" for name in ("unet", "unet_2"))
    assert first.stat().st_ino == second.stat().st_ino
    assert (bundle.path / "unet" / "model.onnx").read_bytes() != (bundle.path / "unet_2" / "model.onnx").read_bytes()


def test_each_graph_is_called_at_its_own_time_steps(bundle, exported, state):
    pipeline = Pipeline.from_bundle(bundle)
    called = []
    for name, graph in zip(("first", "second"), pipeline._graphs.of(pipeline._policy), strict=True):
        join = graph.join

        def watched(shapes, shared, join=join, name=name):
            binding = join(shapes, shared)
            run = binding.run
            binding.run = lambda: (called.append(name), run())
            return binding

        graph.join = watched
    drawn = pipeline("a photo of a bag", num_inference_steps=STEPS, seed=3).pixels
    assert called == ["first", "first", "second", "second"]
    expected = Pipeline.from_bundle(exported)("a photo of a bag", num_inference_steps=STEPS, seed=3).pixels
    assert psnr_db(drawn[0], expected[0]) > 20  # eight items are few: it is the same bag, no more


def test_built_folded_and_opened_again_they_draw_the_same(tmp_path, bundle):
    expected = Pipeline.from_bundle(bundle)("a photo of a bag", num_inference_steps=STEPS, seed=3).pixels
    folded = fold(bundle, tmp_path / "folded", steps=STEPS)
    built = build(folded, tmp_path / "built")
    assert [component.below for component in built.with_role("denoise")] == [None, *_boundaries(bundle)]
    drawn = Pipeline.from_bundle(built)("a photo of a bag", num_inference_steps=STEPS, seed=3).pixels
    assert psnr_db(drawn[0], expected[0]) > 60


def _boundaries(bundle):
    return [component.below for component in bundle.with_role("denoise") if component.below is not None]


def test_a_bundle_without_a_first_denoiser_is_refused(tmp_path, bundle):
    manifest = (bundle.path / "bundle.json").read_text()
    pipeline = Pipeline.from_bundle(bundle)
    lone = replace(bundle, components=tuple(c for c in bundle.components if c.name != "unet"))
    with pytest.raises(BundleError, match="from the first step on"):
        Pipeline(lone, {c.name: pipeline._denoise.session for c in lone.components})
    assert '"below"' in manifest
    assert Bundle.open(bundle.path).component("unet_2").below == bundle.component("unet_2").below


@pytest.mark.parametrize(
    ("text", "message"),
    [("stages = 0", "stages"), ('stages = "2"', "'2'"), ('stages = 2\nrounding = "straight-through"', "straight-through")],
)
def test_bad_stages_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text('weights = "int8"\nactivations = "int8"\n' + text)
    with pytest.raises(ArgumentError, match=message):
        load_recipe(str(file))
