"""Frames through a stream around a bundle, against the same frames drawn one by one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import Component, TensorSpec
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.denoiser import guidance_embedding
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import lcm
from edgediffusion.runtimes.schedules import alpha_bars, variance_preserving
from edgediffusion.runtimes.streaming import Frame, Stream
from edgediffusion.runtimes.streaming.filter import SimilarityFilter
from edgediffusion.runtimes.streaming.stream import stream_timesteps

from .test_pipeline import decode, encode
from .tiny import DECODE, DENOISE, ENCODE, SAMPLING, FakeSession, with_input, write_bundle

ROWS = with_input(DENOISE, TensorSpec("timestep", "float32", ("batch",)))
IMAGE = ("batch", 3, "image_height", "image_width")
ENCODE_IMAGE = Component(
    "vae_encoder",
    "encode_image",
    "vae_encoder/model.onnx",
    (TensorSpec("sample", "float32", IMAGE),),
    (TensorSpec("latent_parameters", "float32", ("batch", 8, "height", "width")),),
)
STEPS = 3


def predict(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    meant = feeds["encoder_hidden_states"].mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
    result: np.ndarray = np.tanh(0.4 * feeds["sample"] + meant + feeds["timestep"].reshape(-1, 1, 1, 1) / 900)
    return result


def encode_image(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """Every second pixel, and a fourth channel; a small variance."""
    small = feeds["sample"][:, :, ::2, ::2]
    mean = np.concatenate([small, small[:, :1] * 0.5], axis=1)
    return np.concatenate([mean, np.full_like(mean, -20)], axis=1)


class Camera:
    """A pipeline of Python functions with rows at different time steps."""

    def __init__(self, folder: Path, *, denoise: Component = ROWS, **facts: Any):
        sampling = replace(SAMPLING, latent_scale=1.0, latent_shift=0.0, **facts)
        components = (ENCODE, denoise, DECODE, ENCODE_IMAGE)
        self.bundle = replace(write_bundle(folder, sampling=sampling), components=components)
        self.denoise = FakeSession.of(denoise, predict)
        self.sessions = {
            "text_encoder": FakeSession.of(ENCODE, encode),
            "unet": self.denoise,
            "vae_decoder": FakeSession.of(DECODE, decode),
            "vae_encoder": FakeSession.of(ENCODE_IMAGE, encode_image),
        }
        self.pipe = Pipeline(self.bundle, self.sessions)


@pytest.fixture
def camera(tmp_path: Path) -> Camera:
    return Camera(tmp_path / "bundle")


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).random((count, 16, 16, 3)).astype(np.float32))


def one_by_one(camera: Camera, picture: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Latent consistency sampling of a picture, with the stream's noise at each step."""
    schedule = camera.bundle.sampling.schedule  # type: ignore[union-attr]
    at = [variance_preserving(alpha_bars(schedule), t) for t in stream_timesteps(schedule, len(noise), 0.5)]
    words = encode({"input_ids": np.array([[0, *[3, 4, 6], *[1] * 4]])})
    pixels = (picture.transpose(2, 0, 1) * 2 - 1)[None]
    x0 = encode_image({"sample": pixels})[:, :4]
    for i, point in enumerate(at):
        x = point.alpha * x0 + point.sigma * noise[i : i + 1]
        epsilon = predict({"sample": x, "timestep": np.array([point.timestep]), "encoder_hidden_states": words})
        skip, out = lcm.boundary(point.timestep)
        x0 = skip * x + out * (x - point.sigma * epsilon) / point.alpha
    drawn = decode({"latent_sample": x0})[0].transpose(1, 2, 0) / 2 + 0.5
    clipped: np.ndarray = drawn.clip(0, 1)
    return clipped


def test_frames_come_out_in_order_as_if_each_were_alone(camera: Camera) -> None:
    stream, given = Stream(camera.pipe, "a red shirt", steps=STEPS, seed=5), pictures(6)
    words = camera.pipe.prepared("a red shirt", guidance_scale=1.0).conditions["encoder_hidden_states"]
    np.testing.assert_array_equal(words, encode({"input_ids": np.array([[0, *[3, 4, 6], *[1] * 4]])}))
    found = [frame for picture in given if (frame := stream(picture))]
    found += stream.drain()
    assert [frame.index for frame in found] == [0, 1, 2, 3, 4, 5]
    assert not any(frame.repeated for frame in found)
    noise = TorchNoise(5).normal((STEPS, 4, 8, 8))
    for frame, picture in zip(found, given, strict=True):
        np.testing.assert_allclose(frame.pixels, one_by_one(camera, picture, noise), atol=2e-5)


def test_there_is_one_call_of_the_network_a_frame(camera: Camera) -> None:
    stream = Stream(camera.pipe, "a red shirt", steps=STEPS)
    for picture in pictures(5):
        stream(picture)
    assert len(camera.denoise.calls) == 5
    for feeds in camera.denoise.calls:
        assert feeds["sample"].shape == (STEPS, 4, 8, 8)
        assert feeds["timestep"].tolist() == list(stream_timesteps(SAMPLING.schedule, STEPS, 0.5))


@pytest.mark.parametrize(("kind", "rows"), [("full", 2 * STEPS), ("initialize", STEPS + 1), ("self", STEPS)])
def test_guided_rows_have_the_unconditional_ones_first(camera: Camera, kind: str, rows: int) -> None:
    stream = Stream(camera.pipe, "a red shirt", negative_prompt="blue", steps=STEPS, guidance=kind, guidance_scale=1.4)
    stream(pictures(1)[0])
    ids = np.round(camera.denoise.calls[0]["encoder_hidden_states"][:, 1, 0] * 10).astype(int).tolist()
    assert ids == [5] * (rows - STEPS) + [3] * STEPS


def test_after_the_last_frames_a_stream_begins_anew(camera: Camera) -> None:
    stream, given = Stream(camera.pipe, "cat", steps=STEPS), pictures(4)
    first = [frame for picture in given if (frame := stream(picture))] + list(stream.drain())
    assert stream(given[0]) is None
    again = [frame for picture in given[1:] if (frame := stream(picture))] + list(stream.drain())
    assert [frame.index for frame in again] == [4, 5, 6, 7]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_a_frame_like_the_last_one_costs_no_call(camera: Camera) -> None:
    stream = Stream(camera.pipe, "cat", steps=1, similarity=SimilarityFilter())
    picture = pictures(1)[0]
    frames = [stream(picture) for _ in range(4)]
    assert all(isinstance(frame, Frame) for frame in frames)
    assert [frame.repeated for frame in frames if frame] == [False, False, True, True]  # the filter begins with a picture to repeat
    assert len(camera.denoise.calls) == 2


def test_embedded_guidance_is_a_condition_of_every_row(tmp_path: Path) -> None:
    denoise = with_input(ROWS, TensorSpec("timestep_cond", "float32", ("batch", 32)))
    camera = Camera(tmp_path / "bundle", denoise=denoise, guidance="embedded", guidance_width=32)
    Stream(camera.pipe, "cat", steps=2, guidance_scale=8.5)(pictures(1)[0])
    np.testing.assert_array_equal(camera.denoise.calls[0]["timestep_cond"], np.tile(guidance_embedding(7.5, 32), (2, 1)))
    with pytest.raises(ArgumentError, match="embedded guidance cannot be guided by other rows"):
        Stream(camera.pipe, "cat", guidance="self")


def test_memory_is_steady(camera: Camera) -> None:
    stream, given = Stream(camera.pipe, "cat", steps=2), pictures(4)

    def run(frames: int) -> int:
        for i in range(frames):
            stream(given[i % 4])
            for session in camera.sessions.values():
                session.calls.clear()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = run(20)
        assert run(200) - before < 20_000  # less than a picture: 3 KB times 200 would be 600 KB
    finally:
        tracemalloc.stop()


def test_timesteps_of_a_stream() -> None:
    schedule = SAMPLING.schedule
    assert stream_timesteps(schedule, 4, 1.0) == (999, 759, 499, 259)  # as latent consistency sampling has them
    assert stream_timesteps(schedule, 2, 0.5) == (499, 259)
    assert stream_timesteps(schedule, 1, 0.3) == (299,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "number of steps cannot be used. Got: 0"),
        ({"steps": 26}, "Got: 26. Allowed: 1 to 25"),
        ({"strength": 0.0}, "strength cannot be used. Got: 0.0"),
        ({"strength": 1.5}, "strength cannot be used. Got: 1.5"),
        ({"strength": 0.01, "steps": 1}, "no step of the solver's 50 is left"),
        ({"guidance": "more"}, "No such guidance of a stream. Got: 'more'. Allowed: none, full, self, initialize"),
    ],
)
def test_bad_values_are_refused(camera: Camera, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Stream(camera.pipe, "cat", **options)


def test_a_graph_with_one_time_step_is_refused(tmp_path: Path) -> None:
    camera = Camera(tmp_path / "bundle", denoise=with_input(DENOISE, TensorSpec("timestep", "float32", (1,))))
    with pytest.raises(BundleError, match=r"takes one time step for all of its rows.*Got: timestep \[1\].*--row-timesteps"):
        Stream(camera.pipe, "cat")


def test_no_picture_is_refused_and_the_stream_goes_on(camera: Camera) -> None:
    stream = Stream(camera.pipe, "cat", steps=1)
    with pytest.raises(ArgumentError, match="no picture|has another shape|Allowed"):
        stream(np.zeros((3, 3, 7), np.float32))
    assert stream(pictures(1)[0]) is not None
