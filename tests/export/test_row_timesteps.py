"""Graphs whose rows may be at different time steps."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import BundleError
from edgediffusion.export import export
from edgediffusion.export.families import stable_diffusion, stable_diffusion_3
from edgediffusion.optimize.fold import fold
from edgediffusion.registry import find
from edgediffusion.runtimes.graph import Graph

SIZES = {"batch": 3, "height": 8, "width": 8}


def export_denoiser(family: ModuleType, source: Path, folder: Path, **options: object) -> Bundle:
    """Less to trace than a whole pipeline."""
    parts = family.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "parts", lambda source: tuple(part for part in parts(source) if part.role == "denoise"))
        return export(source, folder, **options)  # type: ignore[arg-type]


def whole_of(bundle: Bundle) -> Component:
    (component,) = bundle.with_role("denoise")
    return component


def run(bundle: Bundle, component: Component, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    graph = Graph(component, find("runtimes.engines", "onnxruntime").open_session(bundle.path / component.model, threads=1))
    binding = graph.bind({spec.name: arrays[spec.name].shape for spec in component.inputs})
    for name, array in binding.inputs.items():
        array[...] = arrays[name]
    binding.run()
    return {name: array.copy() for name, array in binding.outputs.items()}


@pytest.fixture(scope="module")
def unet(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("rows") / "unet"
    return export_denoiser(stable_diffusion, small, folder, row_timesteps=True, cuts=("up_blocks.1.resnets.0",))


@pytest.fixture(scope="module")
def transformer(flow: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_denoiser(stable_diffusion_3, flow, tmp_path_factory.mktemp("rows") / "transformer", row_timesteps=True)


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_rows_are_as_if_each_were_called_alone(name: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(name)
    whole = whole_of(bundle)
    rng = np.random.default_rng(5)
    shapes = {spec.name: [axis if isinstance(axis, int) else SIZES[axis] for axis in spec.shape] for spec in whole.inputs}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    given["timestep"] = np.array([901, 13, 420], np.float32)
    found = run(bundle, whole, given)["out_sample"]
    for i in range(3):
        alone = run(bundle, whole, {name: array[i : i + 1] for name, array in given.items()})["out_sample"]
        np.testing.assert_allclose(found[i : i + 1], alone, rtol=0, atol=1e-5 * np.abs(found).max())


def test_the_manifest_says_so_of_every_graph(unet: Bundle) -> None:
    shapes = [spec.shape for component in unet.components for spec in component.inputs if spec.name == "timestep"]
    assert shapes == [("batch",), ("batch",)]  # the whole, and what is cut out of it
    assert unet.history[0].arguments["row_timesteps"] is True


def test_folding_refuses_them(unet: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"a time step for each row.*without --row-timesteps"):
        fold(unet, tmp_path / "folded")
