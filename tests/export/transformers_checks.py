"""What holds for every transformer family: its graphs are torch's, its pictures diffusers', and its cuts parts of the whole.

Tolerance of a graph: as in test_bundles.py. Parts have the nodes of the whole, so what differs is what an engine fuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers_tiny

from edgediffusion.bundle import Bundle, Component, axis_size
from edgediffusion.export import export
from edgediffusion.export.block_cuts import BlockCuts
from edgediffusion.export.families import family_of
from edgediffusion.export.source import Source
from edgediffusion.export.validate import Validation, validate
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.engines import Session
from edgediffusion.runtimes.graph import Graph

Arrays = dict[str, np.ndarray]
CLOSE = 1e-5
PROMPTS = ("a red shirt", " Black trousers, of wool ")


class Conformance:
    """``NAME`` is one of ``transformers_tiny.BUILDERS``, ``CUTS`` are all its places to cut at, ``SIZE`` is one in pixels to draw."""

    NAME: ClassVar[str]
    SIZE: ClassVar[tuple[int, int]] = (16, 24)
    CUTS: ClassVar[tuple[str, ...]] = ("transformer_blocks.0", "transformer_blocks.1")

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return transformers_tiny.write(self.NAME, tmp_path_factory.mktemp("pipeline") / self.NAME)

    @pytest.fixture(scope="class")
    def bundle(self, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
        return export(source, tmp_path_factory.mktemp("bundle") / "bundle", cuts=self.CUTS)

    @pytest.fixture(scope="class")
    def report(self, source: Path, bundle: Bundle) -> Validation:
        return validate(of_size(bundle, *self.SIZE), source, prompts=PROMPTS, steps=3, seed=3)

    def test_every_component_equals_torch_and_pictures_equal_diffusers(self, report: Validation) -> None:
        assert report.relative_error < 1e-4, report.components
        assert report.largest_255 < 2, report.pictures

    def test_every_component_is_compared_at_two_batch_sizes_and_two_picture_sizes(self, report: Validation, bundle: Bundle) -> None:
        whole = whole_of(bundle)
        shapes = [found.shape for found in report.components if found.component == whole.name]
        assert [shape[0] for shape in shapes] == [1, 2]
        assert (shapes[0][2:] == shapes[1][2:]) == (whole.inputs[0].shape[2:] == shapes[0][2:])  # but for a network of one size
        assert {found.component for found in report.components} >= {c.name for c in bundle.components if c.cut is None}

    def test_no_graph_computes_in_float64(self, bundle: Bundle) -> None:
        for component in (component for component in bundle.components if component.cut is None):
            model = ir.load(bundle.path / component.model)
            wide = [value.name for node in model.graph.all_nodes() for value in node.outputs if value.dtype == ir.DataType.DOUBLE]
            assert not wide, (component.name, wide)

    def test_every_block_is_a_cut(self, source: Path, bundle: Bundle) -> None:
        cuts = part_of(Source.open(source)).cuts
        assert cuts is not None
        assert bundle.cuts == cuts.places(Source.open(source).network("transformer")) == self.CUTS

    def test_a_tail_behind_a_head_is_the_whole(self, bundle: Bundle) -> None:
        for cut in self.CUTS:
            parts = bundle.with_cut(cut)
            for given, whole in calls(bundle):
                at_cut = {**given, **run(bundle, parts["denoise.head"], given)}
                tail = run(bundle, parts["denoise.tail"], at_cut)
                assert error(tail["out_sample"], whole["out_sample"]) < CLOSE, cut
                residual = tail[f"{cut}.residual"]
                shallow = run(bundle, parts["denoise.shallow"], {**at_cut, f"{cut}.residual": residual})
                assert error(shallow["out_sample"], whole["out_sample"]) < CLOSE, cut
                nothing = run(bundle, parts["denoise.shallow"], {**at_cut, f"{cut}.residual": 0 * residual})
                assert error(nothing["out_sample"], whole["out_sample"]) > 100 * CLOSE, cut

    def test_what_is_given_at_a_cut_is_what_the_network_has_there(self, source: Path, bundle: Bundle) -> None:
        """torch's own network as the oracle, for the streams, the indicators and what all blocks read."""
        origin = Source.open(source)
        network, part = origin.load("transformer"), part_of(origin)
        assert isinstance(part.cuts, BlockCuts)
        given, _ = next(calls(bundle))
        seen = watched(network, part.cuts, self.CUTS)
        with torch.no_grad():
            part.wrap(network)(**{name: torch.from_numpy(array) for name, array in given.items()})
        first = self.CUTS[0]
        for cut in self.CUTS:
            head = run(bundle, bundle.with_cut(cut)["denoise.head"], given)
            tail = run(bundle, bundle.with_cut(cut)["denoise.tail"], {**given, **head})
            streams = {name: value for name, value in seen.items() if name.startswith(f"{cut}.")}
            added = seen[f"{cut}.hidden_states"] - seen[f"{first}.hidden_states"]
            expected = {**streams, f"{cut}.indicator": seen["modulated"] if cut == first else added}
            expected[f"{cut}.residual"] = seen["last"] - seen[f"{cut}.hidden_states"]
            expected |= {"temb": seen["temb"]} if part.cuts.embedding is not None else {}
            assert set(head) | set(tail) == {*expected, "out_sample"}
            for name, array in expected.items():
                assert error({**head, **tail}[name], array) < CLOSE, name

    @pytest.mark.parametrize("policy", ["fora:interval=2", "first-block:threshold=0", "delta-dit:interval=2"])
    def test_policies_that_cut_blocks_draw_with_it(self, bundle: Bundle, policy: str) -> None:
        """With nothing to reuse, a picture is what it is without a cache; with something, it is near."""
        pipeline = Pipeline.from_bundle(of_size(bundle, *self.SIZE), threads=1)
        asked: dict[str, Any] = {"num_inference_steps": 4, "seed": 1}
        asked |= {"class_labels": 3} if pipeline.sampling.classes else {"prompt": PROMPTS[0]}
        plain, cached = (pipeline(**asked, cache=cache).latents for cache in ("none", policy))
        assert error(cached, plain) < (CLOSE if policy.endswith("threshold=0") else 1.0)
        if not policy.endswith("threshold=0"):
            assert error(cached, plain) > 0


def of_size(bundle: Bundle, height: int, width: int) -> Bundle:
    """The bundle, whose pictures are usually of this size, unless they can have one only."""
    facts = bundle.sampling
    assert facts is not None
    if facts.fixed_size:
        return bundle
    return replace(bundle, sampling=replace(facts, height=height, width=width))


def check_whole(source: Path, folder: Path, *, size: tuple[int, int]) -> Bundle:
    """A pipeline without cuts: its graphs and pictures, of a size that is not its usual one."""
    bundle = export(source, folder)
    report = validate(of_size(bundle, *size), source, prompts=PROMPTS, steps=3, seed=3)
    assert report.relative_error < 1e-4, report.components
    assert report.largest_255 < 2, report.pictures
    return bundle


def part_of(source: Source) -> Any:
    family: ModuleType | Any = family_of(source)[1]
    (part,) = (part for part in family.parts(source) if part.role == "denoise")
    return part


def whole_of(bundle: Bundle) -> Component:
    (component,) = bundle.with_role("denoise")
    return component


@lru_cache(maxsize=16)
def session(file: Path) -> Session:
    return find("runtimes.engines", "onnxruntime").open_session(file, threads=1)  # type: ignore[no-any-return]


def run(bundle: Bundle, component: Component, arrays: Arrays) -> Arrays:
    """What the graph gives; it takes what it needs of ``arrays``."""
    graph = Graph(component, session(bundle.path / component.model))
    binding = graph.bind({spec.name: arrays[spec.name].shape for spec in component.inputs})
    for name, array in binding.inputs.items():
        array[...] = arrays[name]
    binding.run()
    return {name: array.copy() for name, array in binding.outputs.items()}


def calls(bundle: Bundle) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs at two batch and two picture sizes, and what the whole network gives for them."""
    whole, generator = whole_of(bundle), np.random.default_rng(5)
    for sizes in ({"batch": 1, "height": 8, "width": 8}, {"batch": 2, "height": 12, "width": 8}):
        given: Arrays = {}
        for spec in whole.inputs:
            shape = [axis if isinstance(axis, int) else axis_size(axis, sizes) for axis in spec.shape]
            whole_numbers = spec.dtype.startswith("int")
            drawn = generator.integers(0, 1000, shape) if whole_numbers else generator.standard_normal(shape)
            given[spec.name] = drawn.astype(spec.dtype)
        given["timestep"] = np.full(1, 421, np.float32)
        if "encoder_attention_mask" in given:
            given["encoder_attention_mask"] = (np.arange(given["encoder_attention_mask"].shape[1]) < 9)[None].repeat(sizes["batch"], 0)
            given["encoder_attention_mask"] = given["encoder_attention_mask"].astype(np.float32)
        yield given, run(bundle, whole, given)


def watched(network: torch.nn.Module, cuts: BlockCuts, places: tuple[str, ...]) -> Arrays:
    """Filled when the network runs: what crosses each place, what the blocks read, and the stream behind the last of them."""
    seen: Arrays = {}
    named = {"hidden_states": ("hidden_states", 0)} | ({"encoder_hidden_states": cuts.context} if cuts.context else {})

    def taken(arguments: tuple[Any, ...], keywords: dict[str, Any], name: str, place: int) -> np.ndarray:
        return np.array(keywords[name] if name in keywords else arguments[place])

    for cut in places:

        def enter(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], cut: str = cut) -> None:
            seen.update({f"{cut}.{stream}": taken(arguments, keywords, *where) for stream, where in named.items()})
            if cuts.embedding is not None:
                seen["temb"] = taken(arguments, keywords, *cuts.embedding)

        network.get_submodule(cut).register_forward_pre_hook(enter, with_kwargs=True)
    network.get_submodule(f"{places[0]}.{cuts.attention}").register_forward_pre_hook(
        lambda module, arguments, keywords: seen.update(modulated=taken(arguments, keywords, "hidden_states", 0)), with_kwargs=True
    )
    network.get_submodule("norm_out").register_forward_pre_hook(lambda module, arguments: seen.update(last=np.array(arguments[0])))
    return seen


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.astype(np.float32) - expected.astype(np.float32)).max() / np.abs(expected).max())
