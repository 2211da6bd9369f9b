"""Tables and sheets are right where they can be checked by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgediffusion.cli._demo import Demo, Row, prompts
from edgediffusion.errors import ArgumentError, EngineError
from edgediffusion.profiles import Latency, Memory, Profile, latency, memory
from edgediffusion.profiles.quality import psnr_db
from edgediffusion.profiles.report import contact_sheet, profile_table


def test_psnr():
    black, grey = np.zeros((4, 4, 1)), np.full((4, 4, 1), 0.1)
    assert psnr_db(grey, black) == pytest.approx(20.0)
    assert math.isinf(psnr_db(black, black))


def test_latency_of_known_times():
    found = Latency.of([1.0, 2.0, 3.0, 4.0, 10.0], 7.0)
    assert (found.median_ms, found.min_ms, found.max_ms, found.runs, found.load_ms) == (3.0, 1.0, 10.0, 5, 7.0)
    assert found.p90_ms == pytest.approx(7.6)  # NumPy's linear rule: 4 + 0.6 * 6


@pytest.mark.parametrize("options", [{"runs": 0}, {"warmup": -1}])
def test_timing_nothing_is_refused(options):
    with pytest.raises(ArgumentError, match="at least one run"):
        latency.measure([], **options)


def test_a_failing_process_is_quoted(make_bundle, tmp_path):
    with pytest.raises(EngineError, match="memory failed"):
        memory.measure(make_bundle(tmp_path / "bundle"))


def test_a_profile_as_text():
    profile = Profile("a machine", "cpu", {"unet": Latency.of([2.0], 5.0)}, 2.0, Memory(90_000_000, 30_000_000, 0.5, 0.1), 12, {"unet": 3})
    shown = profile_table(profile)
    for part in ("unet", "2.00", "5.00", "90 MB", "30 MB", "a machine", "0.50 s"):
        assert part in shown


def test_a_contact_sheet_shows_every_picture_enlarged():
    pictures = [[Image.new("L", (8, 8), value) for value in row] for row in ((10, 20, 30), (40, 50, 60))]
    sheet = contact_sheet(pictures, ("above", "below"), ("one", "two words", "three"), zoom=2)
    values = np.asarray(sheet)[:, :, 0]
    for value in (10, 20, 30, 40, 50, 60):
        assert (values == value).sum() >= 16 * 16


def test_the_demo_has_64_prompts_that_begin_with_the_ten_things():
    found = prompts()
    assert len(found) == len(set(found)) == 64
    assert found[:2] == ["a photo of a t-shirt", "a photo of a pullover"]
    assert "a photo of trousers" in found
    assert "a photo of an ankle boot" in found


def test_the_demo_table_has_all_columns():
    row = Row("unet", 5.0, 2.5, 0.5, 18_000_000, 6_000_000)
    demo = Demo((row,), 100_000_000, 90_000_000, 38.0, 36.0, 33.0, 64, 20, 3.0, "a machine", str(Path("demo")))
    for part in ("component", "unet", "5.00", "2.50", "0.50", "18 MB", "6 MB", "100 MB", "90 MB", "38.0 dB", "lowest 33.0 dB"):
        assert part in str(demo), part
