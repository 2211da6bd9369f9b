"""Passes over a denoiser carry its cuts over: its parts have the codes, scales and tables of the whole, and compute what it does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgediffusion
from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle, axis_size
from edgediffusion.errors import ArgumentError
from edgediffusion.export import export
from edgediffusion.export.families import family_of
from edgediffusion.export.source import Source
from edgediffusion.optimize import QuantizationState, fold, quantize
from edgediffusion.optimize.calibrate import state_of
from edgediffusion.optimize.collect import Item
from edgediffusion.optimize.items import Drawn
from edgediffusion.optimize.recipe import Recipe, load_recipe
from edgediffusion.registry import find
from edgediffusion.runtimes.build import build
from edgediffusion.runtimes.graph import Graph, open_graphs

REFERENCE = Path(edgediffusion.__file__).parent / "reference"
SIZES = ({"batch": 1, "height": 8, "width": 8}, {"batch": 2, "height": 12, "width": 8})
# A convolution gives the skip of the first and the feature of the second: what it gives is quantized.
UNET_CUTS = ("up_blocks.1.resnets.1", "up_blocks.2.resnets.0", "up_blocks.2.resnets.1")
BLOCKS = ("transformer_blocks.0", "transformer_blocks.3")


def denoiser_of(name: str, folder: Path, cuts: tuple[str, ...]) -> Bundle:
    family = family_of(Source.open(REFERENCE / name))[1]
    parts = family.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "parts", lambda given: tuple(part for part in parts(given) if part.role == "denoise"))
        return export(REFERENCE / name, folder, cuts=cuts)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return denoiser_of("fashion", tmp_path_factory.mktemp("float") / "bundle", UNET_CUTS)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return denoiser_of("fashion-dit", tmp_path_factory.mktemp("float") / "bundle", BLOCKS)


@pytest.fixture(scope="module")
def ranges(unet: Bundle) -> QuantizationState:
    return state(unet)


@pytest.fixture(scope="module")
def int8(unet: Bundle, ranges: QuantizationState, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return quantize(unet, ranges, tmp_path_factory.mktemp("int8") / "bundle")


def state(bundle: Bundle, recipe: Recipe | None = None) -> QuantizationState:
    """Of noise at two time steps: any ranges will do."""
    items = [Item(step, "", feeds(bundle, SIZES[1], timestep)) for step, timestep in enumerate((900, 100))]
    return state_of(bundle, None, Drawn(tuple(items), {"guidance_scale": 3.0, "seed": 0}), recipe or load_recipe("int8"))


def feeds(bundle: Bundle, sizes: dict[str, int], timestep: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(int(timestep))
    (whole,) = bundle.with_role("denoise")
    noise = {s.name: rng.standard_normal([d if isinstance(d, int) else axis_size(d, sizes) for d in s.shape]) for s in whole.inputs}
    return {name: array.astype(np.float32) for name, array in {**noise, "timestep": np.full(1, timestep)}.items()}


def run(graph: Graph, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    binding = graph.bind({name: array.shape for name, array in arrays.items()})
    for name, array in binding.inputs.items():
        array[...] = arrays[name]
    binding.run()
    return {name: array.copy() for name, array in binding.outputs.items()}


def answers(bundle: Bundle, timestep: float = 500) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Graph]]]:
    """At two sizes: what is fed, what the whole gives, and all graphs of the denoiser by name."""
    roles = ("denoise", *bundles.CUT_ROLES)
    graphs = {graph.name: graph for graph in open_graphs(bundle, roles, target=None, threads=1)}
    (whole,) = bundle.with_role("denoise")
    for sizes in SIZES:
        given = feeds(bundle, sizes, timestep)
        yield given, run(graphs[whole.name], given), graphs


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_shallow(bundle: Bundle, timestep: float = 500) -> None:
    assert bundle.cuts == UNET_CUTS
    for given, whole, graphs in answers(bundle, timestep):
        for cut in UNET_CUTS:
            found = run(graphs[bundle.with_cut(cut)["denoise.shallow"].name], {**given, cut: whole[cut]})
            assert error(found["out_sample"], whole["out_sample"]) < 1e-5
            assert error(found[f"{cut}.indicator"], whole[f"{cut}.indicator"]) < 1e-5


def check_blocks(bundle: Bundle, timestep: float = 500) -> None:
    assert bundle.cuts == BLOCKS
    for given, whole, graphs in answers(bundle, timestep):
        for cut in BLOCKS:
            head, tail, shallow = (graphs[bundle.with_cut(cut)[f"denoise.{part}"].name] for part in ("head", "tail", "shallow"))
            at_cut = {**given, **run(head, given)}
            found = run(tail, at_cut)
            assert error(found["out_sample"], whole["out_sample"]) < 1e-3
            again = run(shallow, {**at_cut, f"{cut}.residual": found[f"{cut}.residual"]})
            assert error(again["out_sample"], found["out_sample"]) < 1e-3


def without_cuts(bundle: Bundle, folder: Path) -> Bundle:
    """The same graph as if it had been exported so."""
    (whole,) = bundle.with_role("denoise")
    shutil.copytree(bundle.path / whole.name, folder / whole.name)
    model = ir.load(folder / whole.model)
    del model.graph.outputs[1:]
    ir.save(model, folder / whole.model)
    alone = (replace(whole, outputs=whole.outputs[:1]),)
    bundles.write(folder, family=bundle.family, components=alone, sampling=bundle.sampling, history=bundle.history)
    return Bundle.open(folder)


def test_an_int8_unet_has_its_cuts(int8: Bundle) -> None:
    check_shallow(int8)


def test_what_a_cut_gives_is_what_the_next_layers_read(int8: Bundle) -> None:
    """Where a convolution was quantized, its integers read back; a prediction that one gives stays as it is."""
    graph = ir.load(int8.path / "unet" / "model.onnx").graph
    makers = {str(value.name): value.producer() for value in graph.outputs}
    expected = {
        f"{UNET_CUTS[0]}.indicator": "DequantizeLinear",
        UNET_CUTS[1]: "DequantizeLinear",
        UNET_CUTS[2]: "Add",
        "out_sample": "Conv",
    }
    assert {name: makers[name].op_type for name in expected} == expected


def test_cuts_change_nothing_of_what_is_quantized(unet: Bundle, ranges: QuantizationState, int8: Bundle, tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    plain = quantize(without_cuts(unet, tmp_path / "float"), ranges, tmp_path / "int8")
    weights = plain.path / "unet" / "quantized.safetensors"
    assert weights.read_bytes() == (int8.path / "unet" / "quantized.safetensors").read_bytes()
    assert plain.history[-1].arguments["layers"] == int8.history[-1].arguments["layers"]
    for (_, expected, _), (_, found, _) in zip(answers(plain), answers(int8), strict=True):
        assert np.array_equal(expected["out_sample"], found["out_sample"])


def test_the_weights_are_one_file(int8: Bundle) -> None:
    files = list(int8.path.glob("*/*.safetensors"))
    assert {file.name for file in files} == {"quantized.safetensors"}
    assert len(files) == 1 + len(UNET_CUTS)
    assert len({file.stat().st_ino for file in files}) == 1
    Bundle.open(int8.path, verify=True)


def test_split_convolutions_have_their_cuts(unet: Bundle, tmp_path: Path) -> None:
    """A split convolution reads the feature itself, and not only what it is joined to."""
    recipe = Recipe("split", "int8", "int8", split=("conv_shortcut$",))
    check_shallow(quantize(unet, state(unet, recipe), tmp_path / "bundle"))


def test_a_transformer_has_its_cuts(transformer: Bundle, tmp_path: Path) -> None:
    check_blocks(transformer)
    bundle = quantize(transformer, state(transformer), tmp_path / "int8")
    check_blocks(bundle)
    assert len({file.stat().st_ino for file in bundle.path.glob("*/*.safetensors")}) == 1
    check_blocks(fold(bundle, tmp_path / "folded", steps=3, sampler="flow-euler"), timestep=1000)


def test_a_branch_beside_the_layer_at_a_cut(transformer: Bundle, tmp_path: Path) -> None:
    """The text's stream before block 0 is what a layer with such a branch gives: the tail then computes the branch itself."""
    bundle = quantize(transformer, state(transformer, Recipe("branches", "int4", "int8", rank=4)), tmp_path / "bundle")
    check_blocks(bundle)
    first, later = (bundle.with_cut(cut)["denoise.tail"] for cut in BLOCKS)
    assert {spec.name for spec in first.inputs} - {spec.name for spec in later.inputs} >= {"clip_hidden_states", "clip_hidden_states_2"}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_folded_denoiser_has_its_cuts(unet: Bundle, int8: Bundle, tmp_path: Path, quantized: bool) -> None:
    folded = fold(int8 if quantized else unet, tmp_path / "bundle", steps=4, sampler="ddim")
    assert folded.sampling is not None
    assert folded.sampling.folded is not None
    check_shallow(folded, timestep=folded.sampling.folded.timesteps[1])
    assert {file.name for file in folded.path.glob("*/*.safetensors")} == {"folded.safetensors"}
    assert len({file.stat().st_ino for file in folded.path.glob("*/*.safetensors")}) == 1


def test_built_engines_have_their_cuts(int8: Bundle, tmp_path: Path) -> None:
    check_shallow(build(int8, tmp_path / "bundle"))


def test_stages_are_refused(unet: Bundle, ranges: QuantizationState, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be cut.*2 stages, cuts at up_blocks.1.resnets.1.*without --cut"):
        quantize(unet, replace(ranges, below=(500.0,)), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_features_follow_from_those_of_the_picture(unet: Bundle) -> None:
    """A feature is half as high and wide as the picture; nothing is run to find that out."""
    component = unet.with_cut(UNET_CUTS[0])["denoise.shallow"]
    session = find("runtimes.engines", "onnxruntime").open_session(unet.path / component.model, threads=1)
    binding = session.bind({"batch": 2, "height": 12, "width": 8})
    assert binding.inputs[UNET_CUTS[0]].shape == (2, 96, 6, 4)
