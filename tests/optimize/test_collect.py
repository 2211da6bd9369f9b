"""Items on a tiny network: what was fed, drawn batch by batch, kept on disk and found again, and never without telling."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgediffusion.errors import ArgumentError, BundleError, Cancelled, EngineError, OutputError, UnknownName
from edgediffusion.optimize.collect import BATCH, collect
from edgediffusion.optimize.items import Drawing, draw_items
from edgediffusion.optimize.parts import Parts, beside
from edgediffusion.runtimes import Pipeline
from tests.runtimes.tiny import DECODE, DENOISE, ENCODE, SAMPLING, FakeSession, write_bundle

PROMPTS = ["a red shirt", "a shoe", "a photo of a cat"]
DRAWING = Drawing("ndtc", samples=3 * BATCH + 2, steps=4, seed=5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("collect") / "bundle")


@pytest.fixture(scope="module")
def undisturbed(bundle):
    return draw_items(bundle, PROMPTS, DRAWING)


def same(one, two):
    """Bit for bit, types and shapes included: torch takes an array of no axes, and not a NumPy number."""
    assert one.record == two.record
    assert [(i.step, i.prompt, list(i.feeds)) for i in one.items] == [(i.step, i.prompt, list(i.feeds)) for i in two.items]
    for a, b in zip(one.items, two.items, strict=True):
        for name, array in a.feeds.items():
            found = b.feeds[name]
            assert type(found) is np.ndarray
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    return True


class Stop(Exception):
    pass


def stopping(at, error=Stop):
    def progress(label, part):
        if label == "items" and part >= at:
            raise error

    return progress


# --- what an item is


def test_an_item_is_what_was_fed_at_its_step_both_halves_of_the_guidance_batch(bundle):
    pipeline = Pipeline.from_bundle(bundle)
    items = collect(pipeline, PROMPTS, np.array([1, 0, 2]), seed=4, guidance_scale=3.0)
    seen = {}
    prompts = [item.prompt for item in items]
    for _ in pipeline.steps(prompts, num_inference_steps=3, guidance_scale=3.0, seed=4, observe=lambda i, f: seen.update({i: f})):
        pass
    assert [item.step for item in items] == [0, 2, 2]
    for row, item in enumerate(items):
        fed = seen[item.step]
        assert (item.feeds["sample"] == fed["sample"][[row, row + 3]]).all()
        assert (item.feeds["encoder_hidden_states"] == fed["encoder_hidden_states"][[row, row + 3]]).all()
        assert (item.feeds["timestep"] == fed["timestep"]).all()
    assert not (items[0].feeds["encoder_hidden_states"][0] == items[0].feeds["encoder_hidden_states"][1]).all()


def test_under_a_cache_items_are_of_its_trajectories_and_of_all_calls(bundle):
    settings = {"seed": 4, "guidance_scale": 3.0}
    policy = "adaptive-diffusion:threshold=100,most=2"  # it cares for nothing but to compute every third call
    items = collect(Pipeline.from_bundle(bundle), PROMPTS, np.full(8, 1), cache=policy, **settings)
    prompts, computed = [item.prompt for item in items], set()
    pipeline = Pipeline.from_bundle(bundle)
    paths = {}
    for cache in (policy, "none"):
        watch = computed if cache == policy else set()
        steps = pipeline.steps(prompts, num_inference_steps=8, cache=cache, observe=lambda i, f, watch=watch: watch.add(i), **settings)
        paths[cache] = [step.latents.copy() for step in steps]
    cached = [i for i in range(1, 8) if i not in computed]
    assert cached
    assert [item.step for item in items] == list(range(8))
    plain = collect(Pipeline.from_bundle(bundle), PROMPTS, np.full(8, 1), **settings)
    same = [np.array_equal(a.feeds["sample"], b.feeds["sample"]) for a, b in zip(items, plain, strict=True)]
    first = min(cached)
    assert all(same[: first + 1])  # no answer was reused before this call's
    assert not any(same[first + 1 :])


def test_the_record_says_under_which_cache(bundle):
    drawing = Drawing("uniform", samples=2, steps=2)
    assert "cache" not in draw_items(bundle, PROMPTS, drawing).record
    assert draw_items(bundle, PROMPTS, replace(drawing, cache="none")).record["cache"] == "none"


def test_a_cache_that_the_bundle_cannot_have_is_refused(bundle):
    with pytest.raises(BundleError, match="has no cuts"):
        draw_items(bundle, PROMPTS, Drawing("uniform", samples=2, steps=2, cache="deepcache"))
    with pytest.raises(UnknownName, match="caching policy"):
        draw_items(bundle, PROMPTS, Drawing("uniform", samples=2, steps=2, cache="deepcash"))


def test_items_are_as_many_as_the_counts_say_and_every_prompt_has_its_turn(undisturbed):
    steps = [item.step for item in undisturbed.items]
    assert np.bincount(steps, minlength=4).tolist() == undisturbed.record["counts"]
    assert sum(undisturbed.record["counts"]) == DRAWING.samples
    uses = [sum(item.prompt == prompt for item in undisturbed.items) for prompt in PROMPTS]
    assert max(uses) - min(uses) <= 1


def test_the_same_again_is_the_same_and_another_seed_is_not(bundle, undisturbed):
    assert same(undisturbed, draw_items(bundle, PROMPTS, DRAWING))
    other = draw_items(bundle, PROMPTS, replace(DRAWING, seed=6))
    assert (other.items[0].feeds["sample"] != undisturbed.items[0].feeds["sample"]).any()


def test_the_record_says_what_was_left_open(bundle, undisturbed):
    record = undisturbed.record
    assert record["sampler"] == SAMPLING.sampler
    assert record["guidance_scale"] == SAMPLING.guidance_scale
    assert record["options"] == {"variant": "code", "mean_part": 0.4, "std_part": 0.4, "clip": "clamp"}


# --- stopping and going on


@pytest.mark.parametrize("at", [0.4, 0.5, 0.9])
def test_what_was_stopped_goes_on_and_ends_the_same(tmp_path, bundle, undisturbed, at):
    with pytest.raises(Stop):
        draw_items(bundle, PROMPTS, DRAWING, keep=tmp_path, progress=stopping(at))
    told, drawn = [], []
    again = draw_items(bundle, PROMPTS, DRAWING, keep=tmp_path, tell=told.append, progress=lambda label, part: drawn.append(part))
    assert same(undisturbed, again)
    kept = int(at * DRAWING.samples) // BATCH * BATCH  # the batch in which it was stopped is drawn again
    assert told == [f"{kept} of {DRAWING.samples} items were there already, from a run that was stopped."]
    assert drawn[0] == kept / DRAWING.samples


def test_a_damaged_part_is_drawn_again(tmp_path, bundle, undisturbed):
    draw_items(bundle, PROMPTS, DRAWING, keep=tmp_path)
    first, second, *_ = sorted(tmp_path.rglob("items-*.part"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-100])
    told = []
    assert same(undisturbed, draw_items(bundle, PROMPTS, DRAWING, keep=tmp_path, tell=told.append))
    assert told[0].startswith(f"{DRAWING.samples - 2 * BATCH} of ")


@pytest.mark.parametrize(
    ("prompts", "change"),
    [
        (PROMPTS[:2], {}),
        (PROMPTS, {"seed": 6}),
        (PROMPTS, {"steps": 5}),
        (PROMPTS, {"samples": 27}),
        (PROMPTS, {"guidance_scale": 2.0}),
        (PROMPTS, {"sampler": "euler"}),
        (PROMPTS, {"options": {"clip": "resample"}}),
        (PROMPTS, {"strategy": "uniform"}),
    ],
    ids=str,
)
def test_another_setting_starts_anew(tmp_path, bundle, undisturbed, prompts, change):
    draw_items(bundle, PROMPTS, DRAWING, keep=tmp_path)
    told = []
    draw_items(bundle, prompts, replace(DRAWING, **change), keep=tmp_path, tell=told.append)
    assert told == []
    assert len(list(tmp_path.iterdir())) == 2


def test_another_bundle_starts_anew(tmp_path, bundle, undisturbed):
    draw_items(bundle, PROMPTS, DRAWING, keep=tmp_path / "keep")
    other = write_bundle(tmp_path / "other", sampling=replace(SAMPLING, latent_scale=0.25))
    draw_items(other, PROMPTS, DRAWING, keep=tmp_path / "keep")
    assert len(list((tmp_path / "keep").iterdir())) == 2


# --- parts


ARRAYS = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "name": np.array("mid_block"), "none": np.zeros((0, 2))}


def test_a_part_is_read_as_it_was_written(tmp_path):
    parts = Parts(tmp_path / "deep")
    parts.write("one", ARRAYS)
    found = parts.read("one")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert parts.read("two") is None


def test_no_byte_of_a_part_may_change(tmp_path):
    parts = Parts(tmp_path)
    parts.write("one", ARRAYS)
    file = tmp_path / "one.part"
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert parts.read("one") is None
        file.write_bytes(whole[:at])
        assert parts.read("one") is None
    file.write_bytes(whole)
    assert parts.read("one") is not None


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = Parts.of(None, {})
    parts.write("one", ARRAYS)
    assert parts.read("one") is None
    assert not list(tmp_path.iterdir())


def test_parts_go_when_the_work_is_done_and_stay_when_it_is_not(tmp_path):
    output = tmp_path / "state.json"
    with pytest.raises(Stop), beside(output) as folder:
        Parts(folder / "x").write("one", ARRAYS)
        raise Stop
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    with pytest.raises(Cancelled, match="The same command goes on"), beside(output) as folder:
        raise KeyboardInterrupt
    with beside(output) as folder:
        assert Parts(folder / "x").read("one") is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_folder_without_parts_does_not_stay(tmp_path, error):
    with pytest.raises(error), beside(tmp_path / "state.json") as folder:
        folder.mkdir()
        raise error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="disk is full"):
        Parts(tmp_path).write("one", ARRAYS)
    assert Parts(tmp_path).read("one") is None
    assert not list(tmp_path.iterdir())


# --- what cannot be used


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": 0}, ArgumentError, "at least one item. Got: 0"),
        ({"steps": 0}, ArgumentError, "at least one step. Got: 0"),
        ({"strategy": "ndct"}, UnknownName, "Did you mean 'ndtc'"),
        ({"sampler": "eulr"}, UnknownName, "Did you mean 'euler'"),
        ({"options": {"mean": 1}}, ArgumentError, "no option 'mean'"),
        ({"strategy": "stride", "options": {}, "samples": 2}, ArgumentError, "2 items for 4 of 4 steps"),
        ({"strategy": "tdac", "options": {}}, ArgumentError, "no blocks to look into. Name a module with --option cut="),
        ({"strategy": "tdac", "options": {"cut": "nope"}}, UnknownName, "No module of the network is called 'nope'"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused_and_nothing_stays(tmp_path, bundle, change, error, message):
    with pytest.raises(error, match=message), beside(tmp_path / "state.json") as keep:
        draw_items(bundle, PROMPTS, replace(DRAWING, **change), keep=keep)
    assert not list(tmp_path.iterdir())


def test_no_prompts_are_refused(bundle):
    with pytest.raises(ArgumentError, match="has no prompts for them.*--prompts FILE"):
        draw_items(bundle, [], DRAWING)


@pytest.mark.parametrize(("strategy", "told"), [("uniform", True), ("ndtc", True), ("first-step", False)])
def test_fewer_items_than_steps_are_told_where_every_step_should_have_one(bundle, strategy, told):
    lines = []
    drawn = draw_items(bundle, PROMPTS, Drawing(strategy, samples=2, steps=5), tell=lines.append)
    empty = drawn.record["counts"].count(0)
    assert len(lines) == told
    if told:
        assert f"{empty} of 5 steps have none" in lines[0]
        assert "Give --samples 5 or more" in lines[0]


# --- numbers that are not finite


def sessions(bundle, bad_output_at=None, bad_encoding=False):
    def encode(feeds):
        return np.full((len(feeds["input_ids"]), 8, 6), np.nan if bad_encoding else 0.5, np.float32)

    calls = []

    def denoise(feeds):
        calls.append(feeds)
        output = feeds["sample"] * np.float32(0.1)
        if len(calls) - 1 == bad_output_at:
            output[1] = np.inf
        return output

    return {
        "text_encoder": FakeSession.of(ENCODE, encode),
        "unet": FakeSession.of(DENOISE, denoise),
        "vae_decoder": FakeSession.of(DECODE, lambda feeds: feeds["latent_sample"]),
    }


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_output_at": 2}, r"'unet' returned numbers that are not finite in step 3 of 4, at time step \d+"),
        ({"bad_encoding": True}, r"'text_encoder' returned numbers that are not finite.*float32"),
    ],
    ids=["denoiser", "encoder"],
)
def test_a_network_whose_numbers_are_not_finite_is_refused_by_the_step(bundle, options, message):
    pipeline = Pipeline(bundle, sessions(bundle, **options))
    with pytest.raises(EngineError, match=message):
        collect(pipeline, PROMPTS, np.array([1, 1, 1, 1]), seed=0)
