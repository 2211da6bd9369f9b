"""Measuring a correction: on a real pair of bundles whose quantized denoiser is off by something known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle, Sampling, Verb
from edgediffusion.cli import main
from edgediffusion.errors import ArgumentError, OutputError, UnknownName
from edgediffusion.optimize.correct import BATCH, correct
from edgediffusion.registry import find, names
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.corrections._file import Correction
from tests.runtimes.tiny import DENOISE, SAMPLING, write_bundle

pytest.importorskip("onnxruntime")

PROMPTS = ["a red shirt", "a cat", "a blue shoe"]
EXPORT, QUANTIZE = Verb("export", {"source": "abc"}), Verb("quantize", {"state": "def"})
METHODS = [name for name in names("runtimes.corrections") if hasattr(find("runtimes.corrections", name).Method, "fit")]
BIAS = np.array([0.1, -0.2, 0.05, 0.15], np.float32)


def spoil(model: onnx.ModelProto) -> None:
    """The output becomes 1.1 times itself plus BIAS, plus a little that no correction can know: 0.02 cos(40 x)."""
    graph, make = model.graph, onnx.helper.make_node
    for node in graph.node:
        node.output[:] = ["clean" if name == "out_sample" else name for name in node.output]
    weights = {"gain": np.float32(1.1), "bias": BIAS.reshape(1, 4, 1, 1), "fast": np.float32(40), "small": np.float32(0.02)}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    graph.node.extend(
        [
            make("Mul", ["clean", "gain"], ["strong"]),
            make("Mul", ["sample", "fast"], ["angle"]),
            make("Cos", ["angle"], ["wave"]),
            make("Mul", ["wave", "small"], ["rest"]),
            make("Sum", ["strong", "bias", "rest"], ["out_sample"]),
        ]
    )


def write_pair(folder: Path, sampling: Sampling = SAMPLING) -> tuple[Bundle, Bundle]:
    """The float bundle and the one that is off."""
    made = []
    for name, history in (("float", (EXPORT,)), ("quantized", (EXPORT, QUANTIZE))):
        bundle = write_bundle(folder / name, sampling=sampling)
        if QUANTIZE in history:
            file = bundle.path / DENOISE.model
            model = onnx.load(file, load_external_data=False)
            spoil(model)
            file.write_bytes(model.SerializeToString())
        (bundle.path / "bundle.json").unlink()
        bundles.write(bundle.path, family="tiny", components=bundle.components, sampling=sampling, history=history)
        made.append(Bundle.open(bundle.path))
    return made[0], made[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    return write_pair(tmp_path_factory.mktemp("pair"))


def measure(pair: tuple[Bundle, Bundle], output: Path, **settings: Any) -> Correction:
    return correct(pair[1], pair[0], output=output, **{"prompts": PROMPTS, "samples": 20, **settings})


def pictures(bundle: Bundle, **settings: Any) -> np.ndarray:
    return Pipeline.from_bundle(bundle, threads=1)(["a dog", "a big shirt"], seed=99, **settings).latents


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m"])
@pytest.mark.parametrize("method", METHODS)
def test_pictures_come_nearer_to_those_of_the_float_bundle(pair: tuple[Bundle, Bundle], tmp_path: Path, method: str, sampler: str) -> None:
    measure(pair, tmp_path / "c.json", method=method, sampler=sampler, steps=6)
    settings: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 6}
    wanted, plain = (pictures(bundle, **settings) for bundle in pair)
    corrected = pictures(pair[1], correction=tmp_path / "c.json", **settings)
    before, after = (float(np.sqrt(((x - wanted) ** 2).mean())) for x in (plain, corrected))
    # TaC-QDM has no bias of the prediction: it moves the state instead, and leaves a part of the way.
    assert after < before / (2 if method == "tac-qdm" else 10)


@pytest.mark.parametrize("prediction", ["v", "flow", "sample"])
def test_other_predictions_are_corrected_too(tmp_path: Path, prediction: str) -> None:
    flow = {"schedule": replace(SAMPLING.schedule, kind="flow", shift=3.0), "sampler": "flow-euler"} if prediction == "flow" else {}
    pair = write_pair(tmp_path, replace(SAMPLING, prediction=prediction, **flow))  # type: ignore[arg-type]
    found = measure(pair, tmp_path / "c.json", method="d2-dpm", steps=6)
    wanted, plain = (pictures(bundle, num_inference_steps=6) for bundle in pair)
    corrected = pictures(pair[1], num_inference_steps=6, correction=found)
    before, after = (float(np.sqrt(((x - wanted) ** 2).mean())) for x in (plain, corrected))
    assert after < before / 5


def test_finds_what_was_put_in(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    found = measure(pair, tmp_path / "c.json", guidance_scale=1.0)
    # PTQD's slope is over all channels at once, so channels whose means and biases go together move it a little.
    np.testing.assert_allclose(found.parameters["k"], 0.1, atol=1e-2)
    np.testing.assert_allclose(found.parameters["b"], np.tile(BIAS, (3, 1)), atol=4e-3)
    np.testing.assert_allclose(found.parameters["sigma"], 0.02 / np.sqrt(2), rtol=0.05)  # the root mean square of a cosine


def test_pairs_are_taken_after_guidance(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    """A bias is the same in both halves, so guidance keeps it; the slope is of the guided prediction."""
    found = measure(pair, tmp_path / "c.json", guidance_scale=5.0)
    np.testing.assert_allclose(found.parameters["b"], np.tile(BIAS, (3, 1)), atol=4e-3)
    assert found.deployment.guidance_scale == 5.0


def test_the_sums_are_those_of_all_predictions_at_once(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    """What is measured in batches equals NumPy's answer on every prediction kept."""
    found = measure(pair, tmp_path / "c.json", samples=BATCH + 3)
    floats, quantized = (Pipeline.from_bundle(b, threads=1) for b in pair)
    order = np.random.default_rng(0).permutation(BATCH + 3)
    prompts = [PROMPTS[int(i) % 3] for i in order]
    options: dict[str, Any] = {"seed": list(range(BATCH + 3))}
    ask, ask_float = (p.predictor(prompts, **options) for p in (quantized, floats))
    feeds = []
    floats(prompts, observe=lambda i, arrays: feeds.append(arrays["sample"][: BATCH + 3]), **options)
    for i, x in enumerate(feeds):
        e, d = ask_float(x, i).astype(np.float64), ask(x, i).astype(np.float64) - ask_float(x, i)
        k = ((e - e.mean()) * (d - d.mean())).mean() / e.var()
        # Calls of another batch size may round differently: 1e-6 of numbers of one.
        assert found.parameters["k"][i] == pytest.approx(k, abs=1e-5)
        np.testing.assert_allclose(found.parameters["b"][i], (d - k * e).mean(axis=(0, 2, 3)), atol=1e-5)
        assert found.measurement["rms"]["error"][i] == pytest.approx(np.sqrt((d**2).mean()), rel=1e-4)
        assert found.measurement["rms"]["prediction"][i] == pytest.approx(np.sqrt((e**2).mean()), rel=1e-4)
        left = ((e + d - found.parameters["b"][i].reshape(-1, 1, 1)) / (1 + found.parameters["k"][i]) - e) ** 2
        assert found.measurement["rms"]["corrected"][i] == pytest.approx(np.sqrt(left.mean()), rel=1e-4)


def test_drift_is_what_is_left_between_the_trajectories(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    """On the pictures it was measured with, the states of both are the same in the mean of each channel."""
    found = measure(pair, tmp_path / "c.json", method="tac-qdm", samples=BATCH, steps=5)
    assert (found.parameters["drift"][0] == 0).all()
    order = np.random.default_rng(0).permutation(BATCH)
    prompts, options = [PROMPTS[int(i) % 3] for i in order], {"seed": list(range(BATCH)), "num_inference_steps": 5}
    wanted = list(Pipeline.from_bundle(pair[0]).steps(prompts, **options))  # type: ignore[arg-type]
    states = list(Pipeline.from_bundle(pair[1]).steps(prompts, correction=found, **options))  # type: ignore[arg-type]
    plain = list(Pipeline.from_bundle(pair[1]).steps(prompts, **options))  # type: ignore[arg-type]
    for i in range(4):  # the last state has no step after it, and so no drift
        apart = (wanted[i].latents - states[i].latents).mean(axis=(0, 2, 3))
        np.testing.assert_allclose(apart, 0, atol=1e-4)  # float32, of states of 10 and more
        assert np.abs((wanted[i].latents - plain[i].latents).mean(axis=(0, 2, 3))).max() > 0.01


def test_same_arguments_same_file(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    for name in ("a", "b"):
        measure(pair, tmp_path / name, samples=3, method="d2-dpm", options={"mode": "stochastic"})
    measure(pair, tmp_path / "c", samples=3, method="d2-dpm", options={"mode": "stochastic"}, seed=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    stated = json.loads((tmp_path / "a").read_text(encoding="utf-8"))
    assert stated["options"] == {"mode": "stochastic", "granularity": "channel"}
    assert stated["deployment"]["model"] == "abc"
    assert stated["deployment"]["state"] == "def"
    assert stated["measurement"]["samples"] == 3


def test_tells_how_far_it_is(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    measure(pair, tmp_path / "c.json", method="d2-dpm", progress=lambda label, part: told.append((label, part)))
    for label in ("pairs", "pairs without outliers"):
        parts = [part for name, part in told if name == label]
        assert parts == sorted(parts)
        assert parts[-1] == 1.0


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "kind", "message"),
        [
            ({"samples": 0}, ArgumentError, "at least one"),
            ({"prompts": []}, ArgumentError, "at least one"),
            ({"method": "ptdq"}, UnknownName, "Did you mean 'ptqd'"),
            ({"method": "qncd"}, ArgumentError, "finds out while it draws"),
            ({"options": {"mode": "x"}}, ArgumentError, "'ptqd' has no option mode"),
            ({"method": "d2-dpm", "options": {"mode": "x"}}, ArgumentError, "deterministic, stochastic"),
            ({"sampler": "eular"}, UnknownName, "Did you mean 'euler'"),
            ({"steps": 0}, ArgumentError, "number of steps"),
        ],
    )
    def test_of_arguments(self, pair: tuple[Bundle, Bundle], tmp_path: Path, settings: Any, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            measure(pair, tmp_path / "c.json", **settings)
        assert list(tmp_path.iterdir()) == []

    def test_of_a_file_that_exists(self, pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
        (tmp_path / "c.json").write_text("mine", encoding="utf-8")
        with pytest.raises(OutputError, match="exists already"):
            measure(pair, tmp_path / "c.json")
        assert (tmp_path / "c.json").read_text(encoding="utf-8") == "mine"

    @pytest.mark.parametrize(
        ("choose", "message"),
        [
            (lambda a, b: (a, a), "have the same denoiser"),
            (lambda a, b: (a, b), "is quantized itself"),
            (lambda a, b: (b, replace(a, history=(Verb("export", {"source": "other"}),))), "is not the float bundle that"),
            (lambda a, b: (b, replace(a, sampling=replace(SAMPLING, prediction="v"))), "is not the float bundle that"),
        ],
    )
    def test_of_bundles_that_are_no_pair(
        self, pair: tuple[Bundle, Bundle], tmp_path: Path, choose: Callable[[Bundle, Bundle], tuple[Bundle, Bundle]], message: str
    ) -> None:
        bundle, reference = choose(*pair)
        with pytest.raises(ArgumentError, match=message):
            correct(bundle, reference, output=tmp_path / "c.json", prompts=PROMPTS)


class TestCommand:
    def call(self, *arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return result

    def test_measures_and_draws(self, pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
        (tmp_path / "prompts").write_text("\n".join(PROMPTS), encoding="utf-8")
        out, common = tmp_path / "c.json", ("--steps", 4, "--sampler", "euler", "--guidance-scale", 2)
        given = (pair[1].path, "--reference", pair[0].path, "--prompts", tmp_path / "prompts", "--samples", 5, *common)
        chosen = ("--method", "d2-dpm", "--option", "granularity=tensor")
        answer = json.loads(self.call("correct", *given, *chosen, "-o", out, "--json").stdout)
        assert answer["digest"] == Correction.load(out).digest
        assert answer["options"] == {"mode": "deterministic", "granularity": "tensor"}
        assert len(answer["rms"]["corrected"]) == 4
        lines = self.call("correct", *given, "-o", tmp_path / "d.json").stdout.splitlines()
        assert lines[0] == f"{tmp_path / 'd.json'}: ptqd"
        assert lines[2].split() == ["step", "prediction", "(rms)", "error", "corrected"]
        self.call("run", pair[1].path, "--prompt", "a cat", *common, "--correction", out, "-o", tmp_path / "a.png")
        refused = self.call("run", pair[1].path, "--prompt", "a cat", "--correction", out, "-o", tmp_path / "b.png", code=2)
        assert "was measured for something else. Got: the sampler euler, here ddim; the steps 4, here 3" in refused.stderr
        assert not (tmp_path / "b.png").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--option", "mode"), "'mode' is not of the form NAME=VALUE"),
            (("--option", "mode=x"), "has no option mode"),
            (("--method", "qncd"), "edgediffusion run BUNDLE --correction qncd"),
            (("--samples", "0"), "--samples"),
        ],
    )
    def test_arguments_that_cannot_be_used_end_with_2(
        self, pair: tuple[Bundle, Bundle], tmp_path: Path, arguments: tuple[str, ...], message: str
    ) -> None:
        (tmp_path / "prompts").write_text("a", encoding="utf-8")
        given = (pair[1].path, "--reference", pair[0].path, "--prompts", tmp_path / "prompts", *arguments)
        assert message in self.call("correct", *given, "-o", tmp_path / "c.json", code=2).stderr
        assert not (tmp_path / "c.json").exists()
