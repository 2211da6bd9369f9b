"""Pictures within a bound of memory: what is traded in which order, one stage at a time, and the same picture."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner

from edgediffusion.bundle import Bundle
from edgediffusion.cli import main
from edgediffusion.errors import ArgumentError
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline, graph, memory, memory_stages
from edgediffusion.runtimes.build import build
from edgediffusion.runtimes.memory import Need, Room, Way, parse_bytes
from edgediffusion.runtimes.request import Request, plan

from .tiny import DECODE, DENOISE, ENCODE, SAMPLING, FakeSession, write_bundle

MB = 10**6
GROUND = 100 * MB
ALL, STAGED, LEAN = Way(), Way(staged=True), Way(staged=True, lean=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("memory") / "bundle")


@pytest.mark.parametrize(
    ("given", "count"),
    [("6GB", 6_000_000_000), ("5.5 GiB", 5_905_580_032), ("800mb", 800_000_000), ("1kB", 1000), (123, 123), ("123", 123), (1e9, 10**9)],
)
def test_amounts(given: str | float, count: int) -> None:
    assert parse_bytes(given) == count


@pytest.mark.parametrize("given", ["", "much", "0", "0GB", "-1GB", "6 TB", "6GBs", float("nan")])
def test_amounts_that_cannot_be_read(given: str | float) -> None:
    with pytest.raises(ArgumentError, match=r"amount of memory cannot be read.*as 6GB"):
        parse_bytes(given)


class TestOrder:
    """Graphs whose weights and activations are given: MB at the bundle's size, activations in proportion to what is fed."""

    weights: ClassVar = {"text_encoder": 500, "unet": 3000, "vae_decoder": 200}
    activations: ClassVar = {"text_encoder": 10, "unet": 1000, "vae_decoder": 2000}

    @pytest.fixture(autouse=True)
    def _measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def need(file: Path, axes: tuple[tuple[str, int], ...]) -> Need:
            sizes, name = dict(axes), file.parent.name
            part = sizes["batch"] / (2 if name == "unet" else 1) * sizes.get("height", 8) * sizes.get("width", 8) / 64
            activations = self.activations[name] * part * MB
            return Need(self.weights[name] * MB, activations, 2 * activations)

        monkeypatch.setattr(memory, "need_of", need)
        monkeypatch.setattr(memory, "resident_bytes", lambda: GROUND)
        monkeypatch.setattr(memory, "_FIRST_USE_BYTES", 0)

    def room(self, bundle: Bundle, limit_mb: int) -> Room:
        return Room(bundle, limit_mb * MB, lambda settled: bundle.components)

    @pytest.mark.parametrize(
        ("limit_mb", "way", "tile", "separate"),
        [
            (9820, ALL, None, False),  # 100 + 3700 + 2 (10 + 1000 + 2000): arenas stay
            (9819, STAGED, None, False),
            (5100, STAGED, None, False),  # 100 + 3000 + 2000
            (5099, LEAN, None, False),
            (4100, LEAN, None, False),  # 100 + 3000 + 1000
            (4099, LEAN, None, True),
            (3600, LEAN, None, True),  # 100 + 3000 + 500
        ],
    )
    def test_what_is_traded_first(self, bundle: Bundle, limit_mb: int, way: Way, tile: int | None, separate: bool) -> None:
        asked = plan(Request("a cat"), SAMPLING)
        settled, found = self.room(bundle, limit_mb).fit(asked)
        assert (found, settled.tile, settled.separate) == (way, tile, separate)
        assert len(settled.warnings) == (way != ALL)
        assert replace(settled, warnings=(), tile=None, separate=False) == asked

    def test_tiles_where_the_decoder_is_too_large(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TestOrder, "activations", {**self.activations, "vae_decoder": 9000})
        settled, way = self.room(bundle, 4100).fit(plan(Request("a cat"), SAMPLING))
        assert (way, settled.tile, settled.separate) == (LEAN, 8, False)
        (said,) = settled.warnings
        assert said.startswith("For 4.1 GB of memory, 4.1 GB by estimate: graphs are loaded when their turn comes")
        assert said.endswith("memory is given back after each node; the picture is decoded in tiles of 8 pixels.")
        asked, _ = self.room(bundle, 4100).fit(plan(Request("a cat", tile=8), SAMPLING))
        assert "tiles" not in asked.warnings[0]  # that was the caller's choice

    def test_without_guidance_there_are_no_rows_to_part(self, bundle: Bundle) -> None:
        settled, _ = self.room(bundle, 3600).fit(plan(Request("a cat", guidance_scale=1.0), SAMPLING))
        assert not settled.separate

    def test_where_nothing_helps_it_says_what_it_would_take(self, bundle: Bundle) -> None:
        with pytest.raises(ArgumentError) as raised:
            self.room(bundle, 3599).fit(plan(Request("a cat"), SAMPLING))
        message = str(raised.value)
        assert message.startswith("This picture cannot be drawn within 3.6 GB. Got: 3.6 GB by estimate")
        for part in ("weights of 'unet' 3 GB, its activations 500 MB, the rest of this process 100 MB", "--max-memory 3600MB", "Quantize"):
            assert part in message
        settled, _ = self.room(bundle, 3600).fit(plan(Request("a cat"), SAMPLING))
        assert settled.separate

    def test_a_larger_picture_needs_more(self, bundle: Bundle) -> None:
        room = self.room(bundle, 5100)
        assert room.fit(plan(Request("a cat"), SAMPLING))[1] == STAGED
        assert room.fit(plan(Request("a cat", height=24), SAMPLING))[1] == LEAN

    def test_an_estimate_that_was_too_low_is_owned(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "peak_bytes", lambda: 90 * MB)
        room = self.room(bundle, 4000)
        assert room.exceeded() == ()
        monkeypatch.setattr(memory, "peak_bytes", lambda: 4001 * MB)
        assert room.exceeded() == ("The bound of 4 GB was exceeded: this process has reached 4 GB.",)


def test_an_estimate_for_every_graph_of_a_bundle(bundle: Bundle) -> None:
    settled = plan(Request("a cat"), SAMPLING)
    room = Room(bundle, 10**9, lambda settled: bundle.components)
    for component in bundle.components:
        need = room._need(component, settled)
        stored = sum(f.bytes for name, f in bundle.files.items() if name.startswith(f"{component.name}/"))
        assert 0 < need.weights < 3 * stored
        assert 0 < need.activations <= need.arena
        assert need.running(LEAN) == need.weights + need.activations
        assert (need.idle(LEAN), need.idle(ALL)) == (need.weights, need.weights + need.arena)


class TestStages:
    @pytest.fixture
    def opened(self) -> list[tuple[str, bool]]:
        return []

    @pytest.fixture
    def stages(self, opened: list[tuple[str, bool]]) -> memory_stages.Stages:
        def open_session(component: Any, lean: bool) -> Any:
            opened.append((component.name, lean))
            fill = len(opened)
            return FakeSession.of(component, lambda feeds: np.float32(fill))  # type: ignore[arg-type, return-value]

        return memory_stages.Stages(open_session)

    def test_nothing_is_opened_before_it_is_bound(self, stages: memory_stages.Stages, opened: list[tuple[str, bool]]) -> None:
        session = stages.session(ENCODE)
        assert (session.inputs, session.outputs) == (ENCODE.inputs, ENCODE.outputs)
        assert opened == []
        session.bind({"batch": 1})
        assert opened == [("text_encoder", False)]

    def test_one_stage_is_open_at_a_time_and_buffers_stay(self, stages: memory_stages.Stages, opened: list[tuple[str, bool]]) -> None:
        stages.way = STAGED
        first, second = stages.session(ENCODE).bind({"batch": 1}), stages.session(DENOISE).bind({"batch": 1, "height": 2, "width": 2})
        arrays = {**first.inputs, **first.outputs}
        first.run()
        second.run()
        first.run()
        first.run()
        assert [name for name, _ in opened] == ["text_encoder", "unet", "text_encoder", "unet", "text_encoder"]
        assert all({**first.inputs, **first.outputs}[name] is array for name, array in arrays.items())
        assert first.outputs["last_hidden_state"].max() == 5  # by the session that was opened last

    def test_graphs_of_a_stage_stay_together(self, stages: memory_stages.Stages, opened: list[tuple[str, bool]]) -> None:
        stages.way = STAGED
        axes = {"batch": 1, "height": 2, "width": 2}
        part = replace(DENOISE, name="unet_shallow", role="denoise.shallow", cut="up")
        both = [stages.session(c).bind(axes) for c in (DENOISE, part)]
        for binding in both * 2:
            binding.run()
        assert [name for name, _ in opened] == ["unet", "unet_shallow"]

    def test_another_way_opens_them_anew(self, stages: memory_stages.Stages, opened: list[tuple[str, bool]]) -> None:
        binding = stages.session(ENCODE).bind({"batch": 1})
        stages.way = LEAN
        binding.run()
        assert opened == [("text_encoder", False), ("text_encoder", True)]


class TestPipeline:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("onnxruntime")

    def bounded(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, way: Way, **changes: Any) -> Pipeline:
        monkeypatch.setattr(Room, "fit", lambda self, asked: (replace(asked, **changes), way))
        return Pipeline.from_bundle(bundle, threads=1, max_memory="1GB")

    @pytest.mark.parametrize("way", [ALL, STAGED, LEAN])
    def test_loading_changes_no_bit(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
        free, bounded = Pipeline.from_bundle(bundle, threads=1), self.bounded(bundle, monkeypatch, way)
        for options in ({"seed": 1}, {"seed": 2, "height": 24}, {"seed": 3, "guidance_batch": "separate"}, {"seed": 1}):
            want, found = (pipe(["a cat", "a dog"], **options) for pipe in (free, bounded))
            np.testing.assert_array_equal(found.pixels, want.pixels)
            np.testing.assert_array_equal(found.latents, want.latents)

    def test_built_engines_too(self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        built = build(bundle, tmp_path / "built", threads=1)
        free, bounded = Pipeline.from_bundle(built, threads=1), self.bounded(built, monkeypatch, LEAN)
        np.testing.assert_array_equal(bounded("a cat", seed=1).pixels, free("a cat", seed=1).pixels)

    def test_rows_apart_are_near(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        free, bounded = Pipeline.from_bundle(bundle, threads=1), self.bounded(bundle, monkeypatch, LEAN, separate=True)
        assert np.abs(bounded("a cat", seed=1).pixels - free("a cat", seed=1).pixels).max() < 1e-5

    def test_one_session_at_a_time(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        engine, opened = find("runtimes.engines", "onnxruntime"), []
        first = engine.open_session

        def open_session(file: Path, **options: Any) -> Any:
            opened.append((file.parent.name, options.get("lean", False)))
            return first(file, **options)

        monkeypatch.setattr(engine, "open_session", open_session)
        pipe = self.bounded(bundle, monkeypatch, LEAN)
        assert opened == []
        pipe("a cat", seed=1)
        assert opened == [("text_encoder", True), ("unet", True), ("vae_decoder", True)]
        pipe("a cat", seed=2)  # the text is known
        assert [name for name, _ in opened[3:]] == ["unet", "vae_decoder"]

    def test_says_what_was_traded(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "resident_bytes", lambda: 10 * MB)
        monkeypatch.setattr(memory, "_FIRST_USE_BYTES", 0)
        reached = iter((10 * MB, 16 * MB))
        monkeypatch.setattr(memory, "peak_bytes", lambda: next(reached))
        need = memory.need_of
        monkeypatch.setattr(memory, "need_of", lambda file, axes: replace(need(file, axes), weights=3 * MB))
        result = Pipeline.from_bundle(bundle, threads=1, max_memory="15MB")("a cat")
        assert result.warnings[0].startswith("For 15 MB of memory, 13 MB by estimate: ")
        assert "loaded when their turn comes" in result.warnings[0]
        assert result.warnings[1] == "The bound of 15 MB was exceeded: this process has reached 16 MB."

    def test_the_command(self, bundle: Bundle, tmp_path: Path) -> None:
        draw = ["run", str(bundle.path), "--prompt", "a cat", "-o", str(tmp_path / "cat.png"), "--max-memory"]
        refused = CliRunner().invoke(main, [*draw, "1MB"])
        assert refused.exit_code != 0
        assert "This picture cannot be drawn within 1 MB" in refused.output
        assert not (tmp_path / "cat.png").exists()
        drawn = CliRunner().invoke(main, [*draw, "40GB"])
        assert drawn.exit_code == 0, drawn.output
        assert "memory" not in drawn.output

    def test_engines_of_other_libraries_are_refused(self, bundle: Bundle, tmp_path: Path) -> None:
        pytest.importorskip("openvino")
        built = build(bundle, tmp_path / "built", target="openvino-cpu", threads=1)
        with pytest.raises(ArgumentError, match=r"bounded for ONNX Runtime.*engines of openvino for 'openvino-cpu'.*--target onnx"):
            Pipeline.from_bundle(built, max_memory="6GB")
        Pipeline.from_bundle(built, target="onnx", max_memory="6GB")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Only Linux tells what a process has in memory now.")
def test_memory_that_is_given_back_is_seen() -> None:
    script = (
        "import numpy as np\nfrom edgediffusion.runtimes.memory import peak_bytes, resident_bytes\n"
        "before = resident_bytes()\nblock = np.ones(40_000_000, np.uint8)\nthere = resident_bytes()\ndel block\n"
        "print(before, there, resident_bytes(), peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, there, after, peak = map(int, done.stdout.split())
    assert there - before > 38 * MB > after - before
    assert peak > there - MB  # the kernel counts pages of the two at different times


def test_buffers_are_kept_for_the_last_shapes_only(bundle: Bundle) -> None:
    session = FakeSession.of(DECODE, lambda feeds: np.float32(0))  # type: ignore[arg-type, return-value]
    decoder = graph.Graph(DECODE, session)

    def bound(size: int) -> Any:
        return decoder.bind({"latent_sample": (1, 4, size, size), "sample": (1, 3, 2 * size, 2 * size)})

    first = bound(1)
    for size in range(2, graph.KEPT_SHAPES + 1):
        bound(size)
    assert bound(1) is first
    bound(99)  # in place of that of size 2, which was asked for the longest time ago
    assert bound(1) is first
    assert len(session.bound) == graph.KEPT_SHAPES + 1
    bound(2)
    assert len(session.bound) == graph.KEPT_SHAPES + 2
