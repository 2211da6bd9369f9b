"""Both observers on the shipped networks: one state, to float32's rounding. benchmarks/observers.py draws with both."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import edgediffusion
from edgediffusion.export import export
from edgediffusion.export.families import family_of
from edgediffusion.export.source import Source
from edgediffusion.optimize.calibrate import state_of
from edgediffusion.optimize.collect import Item
from edgediffusion.optimize.items import Drawn
from edgediffusion.optimize.recipe import load_recipe

REFERENCE = Path(edgediffusion.__file__).parent / "reference"
RANGES = ("input_low", "input_high", "output_low", "output_high")


def items(bundle):
    """Noise of the latents' size at two time steps; what it is does not matter, only that both observers see it."""
    rng, sizes = np.random.default_rng(0), {"batch": 2, "height": 8, "width": 8}
    component = bundle.with_role("denoise")[0]
    for step, timestep in enumerate((900, 100)):
        feeds = {s.name: rng.standard_normal([sizes.get(d, d) for d in s.shape]).astype(s.dtype) for s in component.inputs}
        yield Item(step, "", {**feeds, "timestep": np.full_like(feeds["timestep"], timestep)})


@pytest.mark.parametrize("name", ["fashion", "fashion-dit"])
def test_both_observers_see_the_same(tmp_path, monkeypatch, name):
    torch.set_num_threads(1)
    source = Source.open(REFERENCE / name)
    family = family_of(source)[1]
    parts = family.parts
    monkeypatch.setattr(family, "parts", lambda given: tuple(p for p in parts(given) if p.name in ("unet", "transformer")))
    bundle = export(source.path, tmp_path / "bundle")
    assert (bundle.path / "prompts.txt").read_bytes() == (source.path / "prompts.txt").read_bytes()
    drawn = Drawn(tuple(items(bundle)), {"guidance_scale": 3.0, "seed": 0})
    # Its factors follow the ranges smoothly; a search may choose another of two candidates that are equally good.
    recipe = replace(load_recipe("int8"), balance="smoothquant")
    graph, module = (state_of(bundle, origin, drawn, recipe) for origin in (None, source))
    assert graph.layers.keys() == module.layers.keys()
    for layer, expected in module.layers.items():
        found = graph.layers[layer]
        for part in RANGES:
            there = getattr(expected, part)
            # Sums in another order, through up to a hundred layers: 1e-5 was seen.
            np.testing.assert_allclose(getattr(found, part), there, atol=1e-4 * np.abs(there).max(), err_msg=f"{layer}: {part}")
        np.testing.assert_allclose(found.weight_amax, expected.weight_amax, rtol=1e-3, err_msg=layer)  # of f w
