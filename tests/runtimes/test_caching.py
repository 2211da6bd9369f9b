"""Caching policies on tiny networks that were really cut: when they compute, what they reuse, what they never mix up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, BundleError, EdgeDiffusionError, UnknownName
from edgediffusion.registry import names
from edgediffusion.runtimes import Pipeline, caching
from edgediffusion.runtimes.network import Call, Graphs

from .cuts import BLOCKS, CUT, Counted, write_cut_transformer, write_cut_unet
from .tiny import SAMPLING, write_bundle

pytest.importorskip("onnxruntime")

PROMPT = "a red shirt"
UNET = {"deepcache", "deepcache-adaptive"}
ANY = {"none", "adaptive-diffusion"}
POLICIES = names(caching.REGISTRY)
RATIOS = "1/1.1/0.95/1.02/0.9"
# Of each policy: options with which it reuses something, and options with which it computes every call.
REUSE = {
    "adaptive-diffusion": "adaptive-diffusion:threshold=inf",
    "deepcache": "deepcache:interval=3",
    "deepcache-adaptive": "deepcache-adaptive:threshold=inf,most=2",
    "delta-dit": "delta-dit:interval=3",
    "first-block": "first-block:threshold=inf",
    "fora": "fora:interval=3",
    "magcache": f"magcache:threshold=0.3,ratios={RATIOS}",
    "taylorseer": "taylorseer:interval=3,disable_before=1",
    "teacache": "teacache:threshold=0.4",
}
NEVER = {
    "adaptive-diffusion": "adaptive-diffusion:threshold=0",
    "deepcache": "deepcache:interval=1",
    "deepcache-adaptive": "deepcache-adaptive:threshold=0",
    "delta-dit": "delta-dit:interval=1",
    "first-block": "first-block:threshold=0",
    "fora": "fora:interval=1",
    "magcache": f"magcache:threshold=0,ratios={RATIOS}",
    "none": "none",
    "taylorseer": "taylorseer:interval=1",
    "teacache": "teacache:threshold=0",
}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_cut_unet(tmp_path_factory.mktemp("cut") / "unet")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_cut_transformer(tmp_path_factory.mktemp("cut") / "transformer")


@pytest.fixture
def bundle_for(unet: Bundle, transformer: Bundle) -> Callable[[str], Bundle]:
    return lambda policy: unet if policy.partition(":")[0] in UNET else transformer


def counted(bundle: Bundle, cache: str = "none") -> tuple[Pipeline, Counted]:
    counts = Counted(bundle)
    policy = caching.resolve(cache)
    graphs = counts([c for c in bundle.components if c.role in ("encode", "decode")] + list(policy.components(bundle)))
    pipeline = Pipeline(bundle, {graph.name: graph.session for graph in graphs}, cache=policy, load=counts)
    counts.ran.clear()
    return pipeline, counts


def whole_calls(pipeline: Pipeline, cache: str, steps: int, **options: object) -> list[int]:
    """At which calls the whole network ran."""
    seen: list[int] = []
    pipeline(PROMPT, num_inference_steps=steps, cache=cache, observe=lambda i, fed: seen.append(i), **options)  # type: ignore[arg-type]
    return seen


def test_every_policy_is_tested() -> None:
    assert {*REUSE, "none"} == set(NEVER) == set(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
class TestEveryPolicy:
    def test_computing_every_call_is_no_cache(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        bundle = bundle_for(policy)
        pipeline, _ = counted(bundle)
        options = {"num_inference_steps": 7, "seed": 3}
        plain, cached = (pipeline(PROMPT, cache=cache, **options) for cache in ("none", NEVER[policy]))  # type: ignore[arg-type]
        assert whole_calls(pipeline, NEVER[policy], 7) == list(range(7))
        if policy in UNET | ANY:
            assert cached.latents.tobytes() == plain.latents.tobytes()  # the same graph ran
        else:  # head and tail, which an engine may fuse otherwise than the whole
            np.testing.assert_allclose(cached.latents, plain.latents, atol=1e-5)

    def test_reuses_something_and_stays_near(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        if policy == "none":
            pytest.skip("it reuses nothing")
        pipeline, _ = counted(bundle_for(policy))
        plain = pipeline(PROMPT, num_inference_steps=12, seed=3).latents
        cached = pipeline(PROMPT, num_inference_steps=12, seed=3, cache=REUSE[policy]).latents
        assert 0 < np.abs(cached - plain).max() < np.abs(plain).max()
        computed = whole_calls(pipeline, REUSE[policy], 12)
        assert computed[0] == 0
        assert len(computed) < 12

    def test_pictures_do_not_know_of_each_other(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        cache = REUSE.get(policy, policy)
        pipeline, _ = counted(bundle_for(policy))
        options = {"num_inference_steps": 5, "cache": cache}
        alone = [pipeline(PROMPT, seed=seed, **options).latents for seed in (1, 2)]  # type: ignore[arg-type]
        again = pipeline(PROMPT, seed=1, **options).latents  # type: ignore[arg-type]
        assert again.tobytes() == alone[0].tobytes()

    def test_loops_side_by_side_reuse_nothing_of_each_other(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        """They share buffers, so that each computes where it cannot trust them."""
        pipeline, _ = counted(bundle_for(policy))
        plain = [pipeline(PROMPT, seed=seed, num_inference_steps=4, cache=NEVER[policy]).latents for seed in (1, 2)]
        both = [pipeline.steps(PROMPT, seed=seed, num_inference_steps=4, cache=REUSE.get(policy, policy)) for seed in (1, 2)]
        for steps in zip(*both, strict=True):
            latents = [step.latents for step in steps]
        for expected, found in zip(plain, latents, strict=True):
            assert found.tobytes() == expected.tobytes()

    def test_guidance_that_is_off_for_a_while(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        """Rows double and halve on the way; what was kept for the others is not taken."""
        bundle = bundle_for(policy)
        pipeline, _ = counted(bundle)
        cache, levels = REUSE.get(policy, policy), (0.8, 3.0) if bundle.sampling == SAMPLING else (0.3, 2.0)
        options = {"num_inference_steps": 12, "guidance_interval": levels, "seed": 5}
        rows: dict[int, int] = {}
        pipeline(PROMPT, cache=cache, observe=lambda i, fed: rows.__setitem__(i, len(fed["sample"])), **options)  # type: ignore[arg-type]
        assert set(rows.values()) == {1, 2}
        switches = [i for i in range(12) if self._on(pipeline, i, levels) != self._on(pipeline, max(i - 1, 0), levels)]
        assert switches
        assert set(switches) <= set(rows)  # the first call of other rows computes

    @staticmethod
    def _on(pipeline: Pipeline, i: int, levels: tuple[float, float]) -> bool:
        from edgediffusion.runtimes.request import Request, plan

        point = plan(Request(PROMPT, num_inference_steps=12), pipeline.sampling).points.at[i]
        return levels[0] < (point.sigma / point.alpha if point.alpha else math.inf) <= levels[1]

    def test_halves_of_guidance_apart(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        """Two calls of one row each have a cache each."""
        if policy in ("deepcache-adaptive", "first-block", "teacache"):
            pytest.skip("each half decides for itself, and may decide otherwise")
        pipeline, _ = counted(bundle_for(policy))
        options = {"num_inference_steps": 6, "seed": 5, "cache": REUSE.get(policy, policy)}
        together, apart = (pipeline(PROMPT, guidance_batch=batch, **options).latents for batch in ("joint", "separate"))  # type: ignore[arg-type]
        np.testing.assert_allclose(apart, together, atol=1e-5)

    def test_batches_and_single_rows(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        pipeline, _ = counted(bundle_for(policy))
        options = {"num_inference_steps": 4, "cache": REUSE.get(policy, policy)}
        assert pipeline([PROMPT, "cat"], seed=[1, 2], **options).latents.shape == (2, 4, 8, 8)  # type: ignore[arg-type]
        assert pipeline(PROMPT, guidance_scale=1.0, **options).latents.shape == (1, 4, 8, 8)  # type: ignore[arg-type]
        assert pipeline(PROMPT, height=24, width=16, **options).latents.shape == (1, 4, 12, 8)  # type: ignore[arg-type]

    def test_questions_beside_the_trajectory_leave_it_alone(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        """A corrector may ask the network in between; here somebody does who changes nothing."""
        cache = REUSE.get(policy, policy)
        pipeline, _ = counted(bundle_for(policy))
        expected = pipeline(PROMPT, num_inference_steps=5, cache=cache).latents
        predict = pipeline.predictor(PROMPT, num_inference_steps=5, cache=cache)
        for step in pipeline.steps(PROMPT, num_inference_steps=5, cache=cache):
            predict(step.latents + 1, 2)
        assert step.latents.tobytes() == expected.tobytes()

    def test_time_steps_that_come_twice(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        """Samplers with several calls a step ask twice at one time step: calls are what is counted."""
        bundle = bundle_for(policy)
        pair = []
        for times in ([900.0, 700, 500, 300, 100, 50], [900.0, 900, 500, 500, 100, 100]):
            counts = Counted(bundle)
            graphs = Graphs(bundle, (), counts)
            shapes = {"sample": (1, 4, 8, 8), "encoder_hidden_states": (1, 8, 6)}
            network = graphs.network(caching.resolve(REUSE.get(policy, policy)), shapes, len(times))
            sample, condition = np.ones((1, 4, 8, 8), np.float32), np.ones((1, 8, 6), np.float32)
            for number, timestep in enumerate(times):
                network(Call(number, sample, timestep, {"encoder_hidden_states": condition}))
            pair.append(counts.ran)
        if policy not in ("deepcache-adaptive", "teacache", "first-block"):  # those look at what the network makes of the time step
            assert pair[0] == pair[1]
        assert len(pair[1]) >= 1

    def test_only_the_graphs_that_it_runs_are_loaded(self, policy: str, bundle_for: Callable[[str], Bundle]) -> None:
        bundle = bundle_for(policy)
        pipeline, counts = counted(bundle, REUSE.get(policy, policy))
        pipeline(PROMPT, num_inference_steps=8)
        denoising = {name for name in counts.loaded if bundle.component(name).role.startswith("denoise")}
        assert denoising == set(counts.ran) - {"text_encoder", "vae_decoder"}
        assert ("denoise" in {bundle.component(name).role for name in denoising}) == (policy in UNET | ANY)


class TestCounts:
    @pytest.mark.parametrize(("steps", "interval"), [(50, 5), (12, 5), (7, 3), (4, 9), (1, 5), (6, 1)])
    def test_deepcache_computes_one_of_n(self, unet: Bundle, steps: int, interval: int) -> None:
        pipeline, counts = counted(unet)
        pipeline(PROMPT, num_inference_steps=steps, cache=f"deepcache:interval={interval}")
        assert counts.times("denoise") == math.ceil(steps / interval)
        assert counts.times("denoise.shallow") == steps - math.ceil(steps / interval)

    @pytest.mark.parametrize("sampler", ["heun", "dpm2", "pndm"])
    def test_samplers_with_several_calls_a_step(self, unet: Bundle, sampler: str) -> None:
        pipeline, counts = counted(unet)
        steps = list(pipeline.steps(PROMPT, num_inference_steps=6, sampler=sampler, cache="deepcache:interval=3"))
        calls = len(steps)
        assert calls > 6
        assert sampler == "dpm2" or len({step.timestep for step in steps}) < calls  # dpm2's second call is in between
        assert counts.times("denoise") == math.ceil(calls / 3)
        assert counts.times("denoise", "denoise.shallow") == calls

    def test_foras_published_count(self) -> None:
        """250 steps at N = 3: 84 full ones, with the last."""
        full = [number for number in range(250) if number % 3 == 0 or number == 249]
        assert len(full) == 84

    @pytest.mark.parametrize(("steps", "interval", "expected"), [(7, 3, [0, 3, 6]), (8, 3, [0, 3, 6, 7]), (5, 9, [0, 4]), (1, 3, [0])])
    def test_fora_computes_one_of_n_and_the_last(self, transformer: Bundle, steps: int, interval: int, expected: list[int]) -> None:
        pipeline, counts = counted(transformer)
        assert whole_calls(pipeline, f"fora:interval={interval}", steps) == expected
        assert counts.times("denoise.head") == steps

    def test_taylorseer_warms_up_then_computes_one_of_n(self, transformer: Bundle) -> None:
        pipeline, _ = counted(transformer)
        assert whole_calls(pipeline, "taylorseer", 16) == [0, 1, 2, 4, 9, 14]  # diffusers' defaults: interval 5, 3 before

    @pytest.mark.parametrize(
        ("cache", "expected"),
        [
            ("teacache:threshold=inf", [0, 9]),
            ("first-block:threshold=inf", [0]),
            ("adaptive-diffusion:threshold=inf,most=1000", [0, 1, 2]),
            ("adaptive-diffusion:threshold=inf,most=2", [0, 1, 2, 5, 8]),
            ("magcache:threshold=inf,most=1000,retention=0,ratios=1/2/3", [0]),
            ("magcache:threshold=inf,most=3,retention=0.2,ratios=1/2/3", [0, 1, 5, 9]),
            ("delta-dit:interval=4", [0, 4, 8]),
        ],
    )
    def test_without_a_bound(self, transformer: Bundle, cache: str, expected: list[int]) -> None:
        pipeline, _ = counted(transformer)
        assert whole_calls(pipeline, cache, 10) == expected

    def test_adaptive_deepcache_has_a_bound_of_age(self, unet: Bundle) -> None:
        pipeline, counts = counted(unet)
        assert whole_calls(pipeline, "deepcache-adaptive:threshold=inf,most=3", 10) == [0, 4, 8]
        counts.ran.clear()
        assert whole_calls(pipeline, "deepcache-adaptive:threshold=0", 4) == [0, 1, 2, 3]
        assert counts.times("denoise.shallow") == 3  # the runs that told that the feature was too old
        counts.ran.clear()
        assert whole_calls(pipeline, "deepcache-adaptive:threshold=0,ahead=true", 6) == [0, 2, 4]
        assert counts.times("denoise.shallow") == 3  # none in vain

    def test_adaptive_policies_compute_more_the_lower_the_threshold(self, unet: Bundle, transformer: Bundle) -> None:
        for bundle, policy in ((unet, "deepcache-adaptive"), (transformer, "teacache"), (transformer, "first-block")):
            pipeline, _ = counted(bundle)
            calls = [len(whole_calls(pipeline, f"{policy}:threshold={t}", 20)) for t in (0, 0.02, 0.1, 0.5, math.inf)]
            assert calls == sorted(calls, reverse=True)
            assert calls[0] == 20 > calls[-1]


class TestGraphs:
    def test_the_feature_is_one_array(self, unet: Bundle) -> None:
        policy = caching.resolve("deepcache")
        graphs = Graphs(unet, (), Counted(unet))
        network = graphs.network(policy, {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 8, 6)}, 5)
        (joined,) = graphs._joined._made.values()
        full, shallow = joined._bindings.values()
        assert full.outputs[CUT] is shallow.inputs[CUT]
        assert full.inputs["sample"] is shallow.inputs["sample"]
        assert full.outputs["out_sample"] is shallow.outputs["out_sample"]
        sample, condition = np.ones((1, 4, 8, 8), np.float32), np.ones((2, 8, 6), np.float32)
        network(Call(0, sample, 500.0, {"encoder_hidden_states": condition}))
        assert np.abs(shallow.inputs[CUT]).max() > 0
        np.testing.assert_array_equal(full.inputs["sample"][0], full.inputs["sample"][1])

    @pytest.mark.parametrize("interval", [1, 2, 5])
    def test_operations_are_as_the_formula_says(self, unet: Bundle, interval: int) -> None:
        """(k C_full + (T - k) C_shallow) / T, k = ceil(T / N), from the multiplications of the graphs that ran."""
        pipeline, counts = counted(unet)
        pipeline(PROMPT, num_inference_steps=12, cache=f"deepcache:interval={interval}")
        macs = {name: multiplications(unet.path / unet.component(name).model) for name in ("unet", "unet_shallow")}
        k = math.ceil(12 / interval)
        done = sum(macs.get(name, 0) for name in counts.ran)
        assert done / 12 == (k * macs["unet"] + (12 - k) * macs["unet_shallow"]) / 12
        assert macs["unet_shallow"] < macs["unet"]

    def test_residuals_of_all_blocks_are_the_same_way_out(self, transformer: Bundle) -> None:
        """shallow(head, residual of tail) is the whole, for every cut: fora at its first reuse, asked the same again."""
        condition, sample = np.full((1, 8, 6), 0.3, np.float32), np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 4, 8, 8)
        answers = []
        for cut in BLOCKS:
            graphs = Graphs(transformer, (), Counted(transformer))
            network = graphs.network(
                caching.resolve(f"fora:interval=9,cut={cut}"), {"sample": sample.shape, "encoder_hidden_states": condition.shape}, 9
            )
            answers += [network(Call(i, sample, 300.0, {"encoder_hidden_states": condition})).copy() for i in (0, 1)]
        for answer in answers[1:]:
            np.testing.assert_allclose(answer, answers[0], atol=2e-6)

    def test_delta_dit_with_the_same_question_is_the_whole_either_way(self, transformer: Bundle) -> None:
        condition, sample = np.full((1, 8, 6), 0.3, np.float32), np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 4, 8, 8)
        counts = Counted(transformer)
        network = Graphs(transformer, (), counts).network(
            caching.resolve(f"delta-dit:interval=9,boundary=0.4,cut={BLOCKS[1]}"),
            {"sample": sample.shape, "encoder_hidden_states": (1, 8, 6)},
            4,
        )
        answers = [network(Call(i, sample, 300.0, {"encoder_hidden_states": condition})).copy() for i in range(4)]
        assert counts.ran == ["head_1", "head_0", "tail_1", "head_1", "shallow_1", "head_0", "tail_1", "head_0", "tail_1"]
        for answer in answers[1:]:
            np.testing.assert_allclose(answer, answers[0], atol=2e-6)

    def test_observers_see_what_the_network_is_fed(self, transformer: Bundle) -> None:
        pipeline, _ = counted(transformer)
        fed: dict[int, dict[str, np.ndarray]] = {}
        plain: dict[int, dict[str, np.ndarray]] = {}
        options = {"num_inference_steps": 4, "seed": 2}
        pipeline(PROMPT, observe=lambda i, f: plain.__setitem__(i, dict(f)), **options)  # type: ignore[arg-type]
        pipeline(PROMPT, observe=lambda i, f: fed.__setitem__(i, dict(f)), cache="fora:interval=9", **options)  # type: ignore[arg-type]
        assert list(fed) == [0, 3]
        assert set(fed[0]) == set(plain[0]) == {"sample", "timestep", "encoder_hidden_states"}
        for name, array in fed[0].items():
            np.testing.assert_array_equal(array, plain[0][name])

    def test_a_correction_that_asks_the_network_itself(self, unet: Bundle) -> None:
        pipeline, counts = counted(unet)
        pipeline(PROMPT, num_inference_steps=12, cache="deepcache:interval=4", correction="qncd")
        assert counts.times("denoise") == 3 + 2  # its own estimates at steps 1 and 11 take the whole network


def multiplications(model: Path) -> int:
    """Multiplications of convolutions for one picture of 8 x 8, from the shapes that ONNX infers."""
    graph = onnx.load(model)
    for value in graph.graph.input:
        for at, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_param"):
                dim.dim_value = 1 if at == 0 else 8
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    known = (*inferred.value_info, *inferred.output, *inferred.input)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in known}
    weights = {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}
    total = 0
    for node in graph.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            over = shapes[node.output[0]] if node.op_type == "Conv" else shapes[node.input[0]]
            total += math.prod(weights[node.input[1]]) * math.prod(over[2:])
    return total


class TestRefusals:
    @pytest.mark.parametrize(
        ("cache", "message"),
        [
            ("deepcash", r"No caching policy is called 'deepcash'.*Did you mean 'deepcache'"),
            ("deepcache:n=3", r"'deepcache' has no option 'n'.*interval \(a whole number, by default 5\)"),
            ("deepcache:interval=0", r"'interval'.*Got: 0.*1 to 1000"),
            ("deepcache:interval=two", r"'interval' of 'deepcache'.*'two'.*a whole number"),
            ("deepcache:schedule=odd", r"'schedule'.*odd.*uniform, non-uniform, center-less"),
            ("deepcache:flavour=mine", r"'flavour'.*mine.*reference, signed"),
            ("deepcache:schedule=non-uniform,center=9", r"beyond the last call.*Got: 9.*0 to 4"),
            ("deepcache:cut=up_blocks.9.resnets.0", rf"no graphs for the cut 'up_blocks.9.resnets.0'.*{CUT}.*--cut up_blocks.9.resnets.0"),
            ("deepcache-adaptive:threshold=-1", r"'threshold'.*-1"),
            ("adaptive-diffusion:threshold=nan", r"'threshold'.*nan"),
            ("fora", r"another kind of network.*a UNet, cut where skips join"),
            ("first-block", r"another kind of network|needs a cut behind the first block"),
            ("first-block:cut=transformer_blocks.0", r"'first-block'.*'transformer_blocks.0'.*behind the first block"),
            ("teacache:cut=transformer_blocks.2", r"'teacache'.*'transformer_blocks.2'.*before the first block"),
            ("teacache:polynomial=1/x", r"'polynomial'.*1/x.*identity, flux, numbers with slashes"),
            ("taylorseer:form=fourier", r"'form'.*fourier.*taylor, newton"),
            ("magcache", r"'magcache' needs the ratios.*tune-cache"),
            ("magcache:ratios=1/nan", r"'ratios'.*1/nan"),
            ("delta-dit:cut=transformer_blocks.0", r"'delta-dit'.*'transformer_blocks.0'"),
        ],
    )
    def test_says_what_is_wrong_and_what_is_allowed(self, unet: Bundle, cache: str, message: str) -> None:
        pipeline, _ = counted(unet)
        with pytest.raises(EdgeDiffusionError, match=message):
            pipeline(PROMPT, num_inference_steps=5, cache=cache)

    @pytest.mark.parametrize("policy", sorted(UNET))
    def test_a_policy_of_unets_on_a_transformer(self, transformer: Bundle, policy: str) -> None:
        with pytest.raises(BundleError, match="another kind of network.*a transformer, cut before a block"):
            counted(transformer, policy)

    @pytest.mark.parametrize("policy", sorted(set(POLICIES) - ANY))
    def test_a_bundle_without_cuts(self, tmp_path: Path, policy: str) -> None:
        bundle = write_bundle(tmp_path / "plain")
        with pytest.raises(BundleError, match="(no cuts|without cuts).*edgediffusion export SOURCE -o BUNDLE --cut"):
            Pipeline.from_bundle(bundle, threads=1, cache=REUSE[policy])

    def test_a_transformer_without_the_cut_that_is_needed(self, tmp_path: Path) -> None:
        first = write_cut_transformer(tmp_path / "first", cuts=BLOCKS[:1])
        inner = write_cut_transformer(tmp_path / "inner", cuts=BLOCKS[1:])
        for bundle, policy, message in (
            (first, "first-block", "cut behind the first block.*transformer_blocks.0.*--cut transformer_blocks.1"),
            (first, "delta-dit", "cut behind the first block"),
            (inner, "delta-dit", "before the first block too.*--cut transformer_blocks.0 --cut transformer_blocks.2"),
            (inner, "teacache", "before the first block"),
        ):
            with pytest.raises((BundleError, ArgumentError), match=message):
                Pipeline.from_bundle(bundle, threads=1, cache=policy)

    def test_a_network_that_changes_on_the_way(self, unet: Bundle) -> None:
        second = replace(unet.component("unet"), name="unet_2", below=500.0)
        staged = replace(unet, components=(*unet.components, second))
        with pytest.raises(BundleError, match="one network from the first step to the last.*unet_2.*adaptive-diffusion"):
            Pipeline.from_bundle(staged, threads=1, cache="deepcache")
        assert Pipeline.from_bundle(staged, threads=1, cache="adaptive-diffusion")(PROMPT, num_inference_steps=2).pixels.shape == (
            1,
            16,
            16,
            3,
        )

    def test_a_default_that_a_request_turns_off(self, unet: Bundle) -> None:
        pipeline, _ = counted(unet, "deepcache:interval=3")
        assert len(whole_calls(pipeline, "none", 6)) == 6
        seen: list[int] = []
        pipeline(PROMPT, num_inference_steps=6, observe=lambda i, fed: seen.append(i))
        assert seen == [0, 3]

    def test_an_unknown_policy_is_an_unknown_name(self) -> None:
        with pytest.raises(UnknownName):
            caching.resolve("nothing")
