"""Graphs of a denoiser's parts compute together what the whole computes, at every place where it can be cut.

Tolerance of a graph: as in test_bundles.py. Parts have the nodes of the whole, so what differs is what an engine fuses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from edgediffusion.bundle import Bundle, Component, TensorSpec, axis_size
from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export import export, skip_cuts
from edgediffusion.export.families import stable_diffusion, stable_diffusion_3
from edgediffusion.export.source import Source
from edgediffusion.registry import find
from edgediffusion.runtimes.graph import Graph

Arrays = dict[str, np.ndarray]
UNET_CUTS = tuple(f"up_blocks.{block}.resnets.{resnet}" for block in (0, 1) for resnet in (0, 1))
BLOCKS = ("transformer_blocks.0", "transformer_blocks.1")
SIZES = ({"batch": 1, "height": 8, "width": 8}, {"batch": 2, "height": 12, "width": 8})
CLOSE = 1e-5


def export_denoiser(family: ModuleType, source: Path, folder: Path, **options: object) -> Bundle:
    """Less to trace than a whole pipeline."""
    parts = family.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "parts", lambda source: tuple(part for part in parts(source) if part.role == "denoise"))
        return export(source, folder, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def unet(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_denoiser(stable_diffusion, small, tmp_path_factory.mktemp("cut") / "unet", cuts=UNET_CUTS)


@pytest.fixture(scope="module")
def cut_flow(flow: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    return export_denoiser(stable_diffusion_3, flow, tmp_path_factory.mktemp("cut") / "transformer", cuts=BLOCKS), flow


@pytest.fixture(scope="module")
def cut_flow_t5(flow_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """With T5, patches of two by two pixels and a block with two attentions."""
    return export_denoiser(stable_diffusion_3, flow_t5, tmp_path_factory.mktemp("cut") / "transformer", cuts=BLOCKS), flow_t5


@pytest.fixture(params=["cut_flow", "cut_flow_t5"])
def transformer(request: pytest.FixtureRequest) -> tuple[Bundle, Path]:
    found: tuple[Bundle, Path] = request.getfixturevalue(request.param)
    return found


def run(bundle: Bundle, component: Component, arrays: Arrays) -> Arrays:
    """What the graph gives; it takes what it needs of ``arrays``."""
    graph = Graph(component, find("runtimes.engines", "onnxruntime").open_session(bundle.path / component.model, threads=1))
    binding = graph.bind({spec.name: arrays[spec.name].shape for spec in component.inputs})
    for name, array in binding.inputs.items():
        array[...] = arrays[name]
    binding.run()
    return {name: array.copy() for name, array in binding.outputs.items()}


def whole_of(bundle: Bundle) -> Component:
    (component,) = bundle.with_role("denoise")
    return component


def feeds(component: Component, sizes: dict[str, int]) -> Arrays:
    rng = np.random.default_rng(5)
    shapes = {spec.name: [axis if isinstance(axis, int) else axis_size(axis, sizes) for axis in spec.shape] for spec in component.inputs}
    noise = {spec.name: rng.standard_normal(shapes[spec.name]).astype(spec.dtype) for spec in component.inputs}
    return {**noise, "timestep": np.full(1, 421, np.float32)}


def calls(bundle: Bundle) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs at two batch and two picture sizes, and what the whole network gives for them."""
    whole = whole_of(bundle)
    for sizes in SIZES:
        given = feeds(whole, sizes)
        yield given, run(bundle, whole, given)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.astype(np.float32) - expected.astype(np.float32)).max() / np.abs(expected).max())


@pytest.mark.parametrize("cut", UNET_CUTS)
def test_a_shallow_graph_with_a_fresh_feature_is_the_whole(unet: Bundle, cut: str) -> None:
    shallow = unet.with_cut(cut)["denoise.shallow"]
    for given, whole in calls(unet):
        found = run(unet, shallow, {**given, cut: whole[cut]})
        assert error(found["out_sample"], whole["out_sample"]) < CLOSE
        assert error(found[f"{cut}.indicator"], whole[f"{cut}.indicator"]) < CLOSE
        other = run(unet, shallow, {**given, cut: whole[cut] + 1})
        assert error(other["out_sample"], whole["out_sample"]) > 100 * CLOSE
        assert np.array_equal(other[f"{cut}.indicator"], found[f"{cut}.indicator"])


def test_every_resnet_of_the_way_up_is_a_cut(unet: Bundle, small: Path) -> None:
    assert unet.cuts == skip_cuts.places(Source.open(small).network("unet")) == UNET_CUTS


def test_what_is_given_at_a_cut_is_what_the_network_joins_there(unet: Bundle, small: Path) -> None:
    """torch's own network as the oracle: what each resnet is called with is the feature, then the skip."""
    network = Source.open(small).load("unet")
    joined: Arrays = {}
    for cut in UNET_CUTS:
        network.get_submodule(cut).register_forward_pre_hook(lambda module, args, cut=cut: joined.update({cut: args[0].numpy()}))
    for given, whole in calls(unet):
        with torch.no_grad():
            network(*(torch.from_numpy(given[name]) for name in ("sample", "timestep", "encoder_hidden_states")))
        for cut in UNET_CUTS:
            assert error(np.concatenate([whole[cut], whole[f"{cut}.indicator"]], axis=1), joined[cut]) < CLOSE


@pytest.mark.parametrize("cut", BLOCKS)
def test_a_tail_behind_a_head_is_the_whole(transformer: tuple[Bundle, Path], cut: str) -> None:
    bundle, _ = transformer
    parts = bundle.with_cut(cut)
    for given, whole in calls(bundle):
        at_cut = {**given, **run(bundle, parts["denoise.head"], given)}
        tail = run(bundle, parts["denoise.tail"], at_cut)
        assert error(tail["out_sample"], whole["out_sample"]) < CLOSE
        shallow = run(bundle, parts["denoise.shallow"], {**at_cut, f"{cut}.residual": tail[f"{cut}.residual"]})
        assert error(shallow["out_sample"], whole["out_sample"]) < CLOSE
        nothing = run(bundle, parts["denoise.shallow"], {**at_cut, f"{cut}.residual": 0 * tail[f"{cut}.residual"]})
        assert error(nothing["out_sample"], whole["out_sample"]) > 100 * CLOSE


def test_what_a_head_gives_is_what_the_network_has_there(transformer: tuple[Bundle, Path]) -> None:
    """torch's own network as the oracle, for the streams, the indicators and the embedding of time and text."""
    bundle, source = transformer
    origin = Source.open(source)
    network = origin.load("transformer")
    seen: dict[str, torch.Tensor] = {}
    for cut in BLOCKS:
        block = network.get_submodule(cut)
        block.register_forward_pre_hook(
            lambda m, args, named, cut=cut: seen.update({f"{cut}.{n}": t for n, t in named.items()}), with_kwargs=True
        )
        block.norm1.register_forward_hook(lambda m, args, given, cut=cut: seen.update({f"{cut}.modulated": given[0]}))
    network.norm_out.register_forward_pre_hook(lambda m, args: seen.update({"last": args[0]}))
    (part,) = (part for part in stable_diffusion_3.parts(origin) if part.role == "denoise")
    given, _ = next(calls(bundle))
    with torch.no_grad():
        part.wrap(network)(**{name: torch.from_numpy(array) for name, array in given.items()})
    first = BLOCKS[0]
    for cut in BLOCKS:
        head = run(bundle, bundle.with_cut(cut)["denoise.head"], given)
        tail = run(bundle, bundle.with_cut(cut)["denoise.tail"], {**given, **head})
        expected = {name: seen[f"{cut}.{name}"] for name in ("hidden_states", "encoder_hidden_states")}
        expected["indicator"] = (
            seen[f"{first}.modulated"] if cut == first else seen[f"{cut}.hidden_states"] - seen[f"{first}.hidden_states"]
        )
        expected["residual"] = seen["last"] - seen[f"{cut}.hidden_states"]
        for name, tensor in expected.items():
            assert error({**head, **tail}[f"{cut}.{name}"], tensor.numpy()) < CLOSE, (cut, name)
        assert error(head["temb"], seen[f"{cut}.temb"].numpy()) < CLOSE


def test_the_whole_graph_is_as_without_cuts(unet: Bundle, small: Path, tmp_path: Path) -> None:
    uncut = export_denoiser(stable_diffusion, small, tmp_path / "bundle")
    assert [spec.name for spec in whole_of(uncut).outputs] == ["out_sample"]
    assert "cuts" not in uncut.history[0].arguments
    assert unet.history[0].arguments["cuts"] == list(UNET_CUTS)
    for given, whole in calls(unet):
        assert np.array_equal(run(uncut, whole_of(uncut), given)["out_sample"], whole["out_sample"])


def test_a_transformer_gives_no_more_than_without_cuts(transformer: tuple[Bundle, Path]) -> None:
    bundle, _ = transformer
    assert [spec.name for spec in whole_of(bundle).outputs] == ["out_sample"]
    model = ir.load(bundle.path / whole_of(bundle).model)
    values = {output.name for node in model.graph for output in node.outputs}
    assert {f"{cut}.{stream}" for cut in BLOCKS for stream in ("hidden_states", "encoder_hidden_states")} <= values


def test_names_and_roles(unet: Bundle, transformer: tuple[Bundle, Path]) -> None:
    cut = UNET_CUTS[3]
    shallow = unet.component("unet_shallow_up_blocks_1_resnets_1")
    assert (shallow.role, shallow.cut) == ("denoise.shallow", cut)
    assert shallow.inputs == (*whole_of(unet).inputs, TensorSpec(cut, "float32", ("batch", 16, "height", "width")))
    assert unet.with_cut(UNET_CUTS[1])["denoise.shallow"].inputs[-1].shape == ("batch", 32, "height/2", "width/2")
    bundle, source = transformer
    patch = Source.open(source).config("transformer")["patch_size"]
    head = bundle.component("transformer_head_transformer_blocks_1")
    assert [spec.name.removeprefix(f"{BLOCKS[1]}.") for spec in head.outputs] == [
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "indicator",
    ]
    assert head.outputs[0].shape == ("batch", "height*width" if patch == 1 else "height*width/4", 32)
    assert {c.cut for c in bundle.components if c.role == "denoise.tail"} == set(BLOCKS)


def test_the_manifest_says_what_the_graphs_say(unet: Bundle, transformer: tuple[Bundle, Path]) -> None:
    for bundle in (unet, transformer[0]):
        for component in bundle.components:
            model = onnx.load(str(bundle.path / component.model), load_external_data=False)
            for specs, values in ((component.inputs, model.graph.input), (component.outputs, model.graph.output)):
                found = [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
                assert found == [(spec.name, spec.shape) for spec in specs], component.name


def test_weights_are_shared_and_graphs_small(unet: Bundle, transformer: tuple[Bundle, Path], small: Path) -> None:
    of_source = {file.stat().st_ino for file in (small / "unet").glob("*.safetensors")}
    assert {file.stat().st_ino for file in unet.path.glob("*/*.safetensors")} == of_source
    for bundle in (unet, transformer[0]):
        graphs = sorted(bundle.path.glob("*/model.onnx"))
        assert len(graphs) == len(bundle.components)
        assert sum(graph.stat().st_size for graph in graphs) < 1_500_000
        Bundle.open(bundle.path, verify=True)


def test_float16_copied_weights_and_another_order_of_cuts(small: Path, tmp_path: Path) -> None:
    bundle = export_denoiser(stable_diffusion, small, tmp_path / "half", dtype="float16", weights="copy", cuts=UNET_CUTS[2:0:-1])
    assert bundle.cuts == UNET_CUTS[1:3]
    files = list(bundle.path.glob("*/*.safetensors"))
    assert len(files) == 3
    assert len({file.stat().st_ino for file in files}) == 1
    for given, whole in calls(bundle):
        for cut in bundle.cuts:
            found = run(bundle, bundle.with_cut(cut)["denoise.shallow"], {**given, cut: whole[cut]})
            assert error(found["out_sample"], whole["out_sample"]) < 2e-3
            assert found["out_sample"].dtype == np.float16


def test_the_same_source_gives_the_same_bytes_and_nothing_tells_about_the_machine(cut_flow: tuple[Bundle, Path], tmp_path: Path) -> None:
    """In another process with another order of sets, from another place, with cuts named in another order."""
    bundle, source = cut_flow
    code = (
        "import sys; from edgediffusion.export import export; from edgediffusion.export.families import stable_diffusion_3 as f; "
        "parts = f.parts; f.parts = lambda s: tuple(p for p in parts(s) if p.role == 'denoise'); "
        "export(sys.argv[1], sys.argv[2], cuts=sys.argv[3:])"
    )
    again = tmp_path / "elsewhere" / "bundle"
    subprocess.run([sys.executable, "-c", code, source, again, *BLOCKS[::-1]], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (again / "bundle.json").read_bytes() == (bundle.path / "bundle.json").read_bytes()
    for file in again.rglob("*.onnx"):
        content = file.read_bytes()
        assert not [s for s in (str(tmp_path), str(source.parent), "site-packages", "/home", ".py", "stack_trace") if s.encode() in content]


def test_an_unknown_cut_is_refused_with_those_that_there_are(small: Path, flow: Path, tmp_path: Path) -> None:
    for source, cut, allowed in ((small, "up_blocks.2.resnets.0", UNET_CUTS), (flow, "transformer_blocks.2", BLOCKS), (flow, "", BLOCKS)):
        with pytest.raises(ArgumentError, match=f"cannot be cut at '{cut}'.*Allowed: {', '.join(allowed)}"):
            export(source, tmp_path / "bundle", cuts=(allowed[0], cut))
        assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_cut(small: Path, tmp_path: Path, only: Callable[..., None]) -> None:
    only("vae_decoder")
    with pytest.raises(ArgumentError, match="No network of a StableDiffusionPipeline can be cut"):
        export(small, tmp_path / "bundle", cuts=UNET_CUTS[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_resnet_that_joins_nothing_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> main (float[2] x) => (float[2] y, float[2] z) { y = Add(x, x)  z = Mul(x, y) }'
    )
    model.graph.outputs[1].name = "up_blocks.0.resnets.0.joined"
    whole = Component("unet", "denoise", "unet/model.onnx", (), (TensorSpec("y", "float32", (2,)),))
    with pytest.raises(SourceError, match="nothing is joined there.*Mul"):
        skip_cuts.settle(model.graph, whole, ["up_blocks.0.resnets.0"])
