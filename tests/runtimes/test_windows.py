"""Windows of samplers that are parallel in time in one call: the picture of one state after the other, in as many calls as rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import Component, TensorSpec
from edgediffusion.errors import ArgumentError, EngineError
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline, caching
from edgediffusion.runtimes.engines import NOT_SHARED, Binding, Session
from edgediffusion.runtimes.network import Call
from edgediffusion.runtimes.samplers import _parallel, paradigms, parataa
from edgediffusion.runtimes.samplers._parallel import Round

from .test_control import PICTURE, RESIDUAL, controlnet
from .test_pipeline import PROMPT, decode, encode
from .test_stream import ENCODE_IMAGE, ROWS, encode_image
from .tiny import DECODE, DENOISE, ENCODE, TOKENS, WIDTH, FakeSession, with_input, write_bundle

MODULES = {"paradigms": paradigms, "parataa": parataa}
TEXTS = {"paradigms": "paradigms:window=5,tolerance=0.05", "parataa": "parataa:window=5,order=2"}
STEPS = 12


class Counted:
    """A session that counts its runs."""

    def __init__(self, session: Session):
        self.inputs, self.outputs, self.runs, self._session = session.inputs, session.outputs, 0, session

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> Binding:
        binding = self._session.bind(axes, shared)
        run = binding.run

        def counted() -> None:
            self.runs += 1
            run()

        binding.run = counted  # type: ignore[method-assign]
        return binding


class Tiny:
    """The tiny network in ONNX Runtime, with a time step for each row or one for all."""

    def __init__(self, folder: Path, denoise: Component):
        bundle = write_bundle(folder, components=(ENCODE, denoise, DECODE))
        engine = find("runtimes.engines", "onnxruntime")
        sessions = {c.name: Counted(engine.open_session(bundle.path / c.model, threads=1)) for c in bundle.components}
        self.unet = sessions["unet"]
        self.pipe = Pipeline(bundle, sessions)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.unet.runs = 0
        return self.pipe(*arguments, **{"num_inference_steps": STEPS, "seed": 3, **options})


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Tiny]:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("windows")
    return Tiny(folder / "rows", ROWS), Tiny(folder / "one", DENOISE)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """The rounds of all samplers from here on."""
    found: list[Round] = []

    def recorded(own: Any) -> Any:
        def rounds(*arguments: Any, **options: Any) -> Iterator[Round]:
            for each in own(*arguments, **options):
                found.append(each)
                yield each

        return rounds

    for module in MODULES.values():
        monkeypatch.setattr(module, "rounds", recorded(module.rounds))
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "guidance": {},
    "no guidance": {"guidance_scale": 1.0},
    "rescaled": {"guidance_rescale": 0.7},
    "threshold": {"dynamic_threshold": (0.9,)},
    "three pictures": {"num_images": 3, "seed": [1, 2, 3], "negative_prompt": "a blue shoe"},
    "another size": {"height": 24, "width": 16},
    "noise in steps": {"eta": 0.7},
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("case", OPTIONS)
def test_the_picture_of_one_after_the_other_in_as_many_calls_as_rounds(
    both: tuple[Tiny, Tiny], rounds: list[Round], name: str, case: str
) -> None:
    rows, one = both
    options = dict(OPTIONS[case])
    sampler = TEXTS[name] + (f",eta={options.pop('eta')}" if "eta" in options else "")
    found = rows(PROMPT, sampler=sampler, **options)
    asked = [each.calls for each in rounds]
    assert max(asked) == 5
    assert rows.unet.runs == found.calls == len(asked) < STEPS
    expected = one(PROMPT, sampler=sampler, **options)
    assert one.unet.runs == expected.calls == sum(asked) > len(asked)
    assert [each.calls for each in rounds] == asked * 2
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=1e-5 * np.abs(expected.latents).max())


@pytest.mark.parametrize("name", MODULES)
def test_rows_of_guidance_apart_are_two_calls_a_round(both: tuple[Tiny, Tiny], rounds: list[Round], name: str) -> None:
    rows, one = both
    found = rows([PROMPT, "a cat"], sampler=TEXTS[name], guidance_batch="separate")
    assert (found.calls, rows.unet.runs) == (len(rounds), 2 * len(rounds))
    expected = one([PROMPT, "a cat"], sampler=TEXTS[name])
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=1e-5 * np.abs(expected.latents).max())


@pytest.mark.parametrize("name", MODULES)
def test_guidance_for_a_part_of_the_steps_parts_a_window(both: tuple[Tiny, Tiny], rounds: list[Round], name: str) -> None:
    rows, one = both
    options: dict[str, Any] = {"sampler": TEXTS[name], "guidance_interval": (0.5, 3.0), "num_images": 2}
    found = rows(PROMPT, **options)
    assert len(rounds) < found.calls == rows.unet.runs < sum(each.calls for each in rounds)
    expected = one(PROMPT, **options)
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=1e-5 * np.abs(expected.latents).max())


@pytest.mark.parametrize("name", MODULES)
def test_pictures_that_take_different_numbers_of_rounds(both: tuple[Tiny, Tiny], name: str) -> None:
    # Some starts are so large that the network saturates, and their guesses are right at once.
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32) * np.float32([0.1, 1, 30]).reshape(-1, 1, 1, 1)
    prompts, options = [PROMPT, "a cat", "a dog"], {"sampler": TEXTS[name].replace("window=5", "window=12")}
    alone = [both[0](prompt, latents=latents[i : i + 1], **options).calls for i, prompt in enumerate(prompts)]
    assert len(set(alone)) > 1
    found, expected = (tiny(prompts, latents=latents, **options) for tiny in both)
    assert found.calls <= STEPS < expected.calls
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=1e-5 * np.abs(expected.latents).max())


@pytest.mark.parametrize("name", MODULES)
def test_without_tolerance_every_picture_of_a_batch_is_ddims(both: tuple[Tiny, Tiny], name: str) -> None:
    exact = {"paradigms": "paradigms:tolerance=0", "parataa": "parataa:absolute=0,relative=0"}[name]
    prompts, seeds = [PROMPT, "a cat", "a very big dog"], [4, 5, 6]
    found = both[0](prompts, seed=seeds, sampler=exact).latents
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        expected = both[1](prompt, seed=seed, sampler="ddim").latents[0]
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_batch_of_states_parts_a_window_evenly(both: tuple[Tiny, Tiny], rounds: list[Round], name: str, batch: int) -> None:
    found = both[0](PROMPT, sampler=f"{TEXTS[name]},batch={batch}")
    assert both[0].unet.runs == found.calls == sum(math.ceil(each.calls / batch) for each in rounds)
    whole = both[0](PROMPT, sampler=TEXTS[name])
    np.testing.assert_allclose(found.latents, whole.latents, rtol=0, atol=1e-5 * np.abs(whole.latents).max())


@pytest.mark.parametrize(("count", "most", "expected"), [(10, 4, [3, 3, 4]), (10, 5, [5, 5]), (3, 7, [3]), (5, 1, [1] * 5), (9, 0, [9])])
def test_parts(count: int, most: int, expected: list[int]) -> None:
    sizes: list[int] = []

    def denoise(states: Any, indices: Any) -> list[np.ndarray]:
        sizes.append(len(states))
        return [x + i for x, i in zip(states, indices, strict=True)]

    found = _parallel.in_parts(denoise, most)([np.zeros(1) for _ in range(count)], range(7, 7 + count))
    assert sizes == expected
    assert [float(x[0]) for x in found] == list(range(7, 7 + count))


@pytest.mark.parametrize("name", MODULES)
def test_a_step_shows_what_the_network_took_its_state_for(both: tuple[Tiny, Tiny], name: str) -> None:
    options: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 3, "sampler": TEXTS[name]}
    rows, one = (list(tiny.pipe.steps(PROMPT, **options)) for tiny in both)
    assert len(rows) == len(one) == STEPS
    assert all(step.calls in (0, 1) for step in rows)
    for step, expected in zip(rows, one, strict=True):
        assert (step.index, step.timestep) == (expected.index, expected.timestep)
        np.testing.assert_allclose(step.denoised, expected.denoised, rtol=0, atol=1e-5 * np.abs(expected.denoised).max())
    by_ddim = list(both[1].pipe.steps(PROMPT, **{**options, "sampler": "ddim"}))
    for step, expected in zip(rows, by_ddim, strict=True):  # within the tolerance of the sampler
        assert float(np.sqrt(((step.denoised - expected.denoised) ** 2).mean())) < 0.1 * float(expected.denoised.std())


class Fakes:
    """Networks as Python functions, with a time step for each row or one for all, so that a test sees what is fed."""

    def __init__(self, folder: Path, *added: TensorSpec, rows: bool = True, controls: int = 0):
        timestep = TensorSpec("timestep", "float32", ("batch",) if rows else ())
        leading = [with_input(controlnet(number), timestep) for number in range(controls)]
        unet = with_input(DENOISE, timestep, *added)
        functions = [(ENCODE, encode), *((c, lead) for c in leading), (unet, predict), (DECODE, decode), (ENCODE_IMAGE, encode_image)]
        self.sessions = {component.name: FakeSession.of(component, function) for component, function in functions}
        components = tuple(component for component, _ in functions)
        self.pipe = Pipeline(replace(write_bundle(folder), components=components), self.sessions)
        self.calls = self.sessions["unet"].calls


def predict(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each row by what it is fed, and by nothing of the others."""
    of_row = feeds["encoder_hidden_states"].mean(axis=(1, 2)) + feeds["timestep"] / 1000
    sample, led = feeds["sample"], feeds.get(RESIDUAL.name, np.float32(0))
    beside = sample[:, 4:].mean(axis=1, keepdims=True) if sample.shape[1] > 4 else 0.0
    result: np.ndarray = np.tanh(0.4 * sample[:, :4] + of_row.reshape(-1, 1, 1, 1) + led + beside)
    return result


def lead(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    (scale,) = (array.item() for name, array in feeds.items() if name.startswith("conditioning_scale"))
    (shown,) = (array for name, array in feeds.items() if name.startswith("controlnet_cond"))
    of_row = shown.mean(axis=(1, 2, 3)) + feeds["timestep"] / 2000
    result: np.ndarray = scale * (0.1 * feeds["sample"] + of_row.reshape(-1, 1, 1, 1))
    return result


def test_every_row_is_fed_its_state_its_time_step_and_its_text(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path / "bundle")
    fakes.pipe([PROMPT, "a cat"], negative_prompt="a dog", sampler="paradigms:window=3", num_inference_steps=6, seed=1)
    feeds = fakes.calls[0]
    assert feeds["sample"].shape == (2 * 3 * 2, 4, 8, 8)
    # The first guess is that nothing moves, so all states are alike: two pictures, three states, two halves.
    np.testing.assert_array_equal(feeds["sample"], np.concatenate([feeds["sample"][:2]] * 6))
    np.testing.assert_array_equal(feeds["timestep"], [831, 831, 665, 665, 499, 499] * 2)  # six leading steps with an offset of 1
    texts = feeds["encoder_hidden_states"]
    assert texts.shape == (12, TOKENS, WIDTH)
    away, red, cat = texts[0], texts[6], texts[7]
    assert not np.array_equal(red, cat)
    assert not np.array_equal(red, away)
    np.testing.assert_array_equal(texts, np.stack([away] * 6 + [red, cat] * 3))


def test_a_graph_of_whole_time_steps_is_fed_the_nearest(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path / "bundle", TensorSpec("timestep", "int64", ("batch",)))
    fakes.pipe(PROMPT, sampler="paradigms:window=3", num_inference_steps=6, guidance_scale=1.0)
    assert fakes.calls[0]["timestep"].tolist() == [831, 665, 499]
    shapes = {"sample": (4, 4, 8, 8), "encoder_hidden_states": (4, TOKENS, WIDTH)}
    network = fakes.pipe._graphs.network(caching.resolve(None), shapes, 1)
    texts = {"encoder_hidden_states": np.zeros(shapes["encoder_hidden_states"], np.float32)}
    network(Call(0, np.zeros((2, 4, 8, 8), np.float32), 830.7, texts, timesteps=np.array([830.7, 12.4])))
    assert fakes.calls[-1]["timestep"].tolist() == [831, 12, 831, 12]


@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.2, 0.6)])
def test_control_pictures_lead_as_they_do_one_state_after_the_other(tmp_path: Path, controls: int, part: tuple[float, float]) -> None:
    shown = [PICTURE, 1 - PICTURE]
    start, end = part
    options: dict[str, Any] = {"control_image": [shown] * controls if controls > 1 else shown, "controlnet_conditioning_scale": 0.5}
    options |= {"control_guidance_start": start, "control_guidance_end": end, "sampler": "paradigms:window=4", "num_inference_steps": 8}
    rows, one = (Fakes(tmp_path / f"{at}", RESIDUAL, rows=at, controls=controls) for at in (True, False))
    found, expected = (fakes.pipe([PROMPT, "a cat"], **options) for fakes in (rows, one))
    assert found.calls == len(rows.calls) < expected.calls
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=1e-5 * np.abs(expected.latents).max())


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("fills_in", [False, True])
def test_from_pictures(tmp_path: Path, strength: float, fills_in: bool) -> None:
    """With ``fills_in`` the network was trained for it, and sees the mask and what it leaves of the picture as further channels."""
    options: dict[str, Any] = {"image": [PICTURE, 1 - PICTURE], "strength": strength, "seed": [1, 2], "num_inference_steps": 8}
    if fills_in:
        options["mask_image"] = (np.arange(256).reshape(16, 16, 1) % 16 < 8).astype(np.float32)
    added = [TensorSpec("sample", "float32", ("batch", 9, "height", "width"))] if fills_in else []
    rows, one = (Fakes(tmp_path / f"{at}", *added, rows=at) for at in (True, False))
    found, expected = (fakes.pipe([PROMPT, "a cat"], sampler="paradigms:window=4", **options) for fakes in (rows, one))
    assert found.calls == len(rows.calls) < expected.calls
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=1e-5 * np.abs(expected.latents).max())


def test_the_bare_loop(tmp_path: Path) -> None:
    sample, meant = np.random.default_rng(0).standard_normal((3, 4, 8, 8)), np.ones((3, TOKENS, WIDTH), np.float32)
    rows, one = (Fakes(tmp_path / f"{at}", rows=at) for at in (True, False))
    options: dict[str, Any] = {"unconditional": {"encoder_hidden_states": -meant}, "sampler": "parataa", "num_inference_steps": 8}
    found, expected = (fakes.pipe.denoise(sample, {"encoder_hidden_states": meant}, **options) for fakes in (rows, one))
    assert len(rows.calls) < len(one.calls)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class TestOneAfterTheOther:
    def test_is_told_with_what_to_do(self, both: tuple[Tiny, Tiny]) -> None:
        rows, one = both
        assert rows(PROMPT, sampler="paradigms").warnings == ()
        assert one(PROMPT, sampler="ddim").warnings == ()
        (warning,) = one(PROMPT, sampler="paradigms:window=5").warnings
        assert warning.startswith("The sampler 'paradigms:window=5' asked about one state after the other, which gains nothing")
        assert warning.endswith(
            "the graph 'unet' takes one time step for all rows; edgediffusion export --row-timesteps makes one for each."
        )

    def test_where_an_observer_counts_steps(self, both: tuple[Tiny, Tiny]) -> None:
        seen: list[tuple[int, int]] = []
        found = both[0](PROMPT, sampler="paradigms", observe=lambda i, fed: seen.append((i, len(fed["sample"]))))
        assert len(seen) == found.calls > STEPS
        assert {rows for _, rows in seen} == {2}
        assert "observed" in found.warnings[0]

    def test_within_a_bound_of_memory(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        bundle = write_bundle(tmp_path / "bundle", components=(ENCODE, ROWS, DECODE))
        found = Pipeline.from_bundle(bundle, threads=1, max_memory="100GB")(PROMPT, sampler="paradigms", num_inference_steps=STEPS)
        assert found.calls > STEPS
        assert "memory is bounded" in found.warnings[0]

    @pytest.mark.parametrize(
        ("denoisers", "reason"),
        [
            ((ROWS, replace(ROWS, name="unet_late", below=500.0)), "the network changes on the way, to unet_late"),
            (
                (with_input(ROWS, TensorSpec("sample", "float32", (2, 4, "height", "width")), TensorSpec("timestep", "float32", (2,))),),
                "'unet' takes one",
            ),
        ],
        ids=["stages", "fixed rows"],
    )
    def test_where_rows_cannot_be_apart(self, tmp_path: Path, denoisers: tuple[Any, ...], reason: str) -> None:
        sessions = {c.name: FakeSession.of(c, predict) for c in denoisers}
        sessions |= {"text_encoder": FakeSession.of(ENCODE, encode), "vae_decoder": FakeSession.of(DECODE, decode)}
        bundle = replace(write_bundle(tmp_path / "bundle"), components=(ENCODE, *denoisers, DECODE))
        found = Pipeline(bundle, sessions)(PROMPT, sampler="paradigms", num_inference_steps=STEPS)
        assert found.calls == sum(len(sessions[c.name].calls) for c in denoisers) > STEPS
        assert reason in found.warnings[0]


class TestRefuses:
    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize(("options", "what"), [({"cache": "adaptive-diffusion"}, "a cache"), ({"correction": "qncd"}, "a correction")])
    def test_what_counts_calls(self, both: tuple[Tiny, Tiny], name: str, options: dict[str, Any], what: str) -> None:
        with pytest.raises(ArgumentError, match=f"'{name}' asks about several steps at once, and cannot go with {what}"):
            both[0](PROMPT, sampler=name, **options)
        assert both[0].unet.runs == 0

    @pytest.mark.parametrize("batch", ["-1", "1001", "two"])
    @pytest.mark.parametrize("name", MODULES)
    def test_batches(self, both: tuple[Tiny, Tiny], name: str, batch: str) -> None:
        with pytest.raises(ArgumentError, match=r"batch'.*cannot be used"):
            both[0](PROMPT, sampler=f"{name}:batch={batch}")

    def test_numbers_that_are_not_finite_and_says_of_which_step(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle")
        broken = fakes.sessions["unet"]
        broken.function = lambda feeds: np.where(feeds["timestep"].reshape(-1, 1, 1, 1) == 499, np.nan, predict(feeds))
        with pytest.raises(EngineError, match=r"'unet' returned numbers that are not finite in step 3 of 6, at time step 499"):
            fakes.pipe(PROMPT, sampler="paradigms:window=4", num_inference_steps=6)
