from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgediffusion import runtimes
from edgediffusion.bundle import Bundle
from edgediffusion.cli import main
from edgediffusion.cli._draw import grid
from edgediffusion.errors import ArgumentError

Make = Callable[[Path], Bundle]


@dataclass(frozen=True)
class Step:
    index: int
    total: int


@dataclass(frozen=True)
class Timings:
    encode_ms: float = 1.0
    step_ms: tuple[float, ...] = (2.0, 2.0)
    decode_ms: float = 3.0


class StandIn:
    """A pipeline that draws grey squares, one shade a picture, and remembers what it was asked."""

    asked: dict[str, Any]

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, target: str | None = None, cache: str | None = None) -> StandIn:
        cls.asked = {"bundle": bundle, "target": target}
        return cls()

    def __call__(self, prompts: tuple[str, ...], *, callback: Callable[[Step], object], **options: Any) -> Any:
        if options["correction"] == "other.json":
            raise ArgumentError("The correction was measured for another bundle")
        type(self).asked.update(options, prompts=prompts)
        for index in range(2):
            callback(Step(index, 2))
        count = len(prompts) * options["num_images"]

        class Result:
            images = tuple(Image.new("L", (8, 8), 40 * n) for n in range(count))
            timings = Timings()
            seeds = (options["seed"],)
            warnings = ("The prompt is too long; this part of it was left out: 'x'",) if "long" in prompts else ()

        return Result()


@pytest.fixture
def bundle(tmp_path: Path, make_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(runtimes, "Pipeline", StandIn, raising=False)
    StandIn.asked = {}
    return make_bundle(tmp_path / "bundle")


def run(bundle: Bundle, *arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["run", str(bundle.path), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_a_picture_is_written_and_its_name_printed(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    result = run(bundle, "--prompt", "a shoe", "--seed", 3, "--steps", 9, "--guidance-scale", 2, "--sampler", "euler", "-o", out)
    assert result.stdout == f"{out}\n"
    assert "100%" in result.stderr
    assert Image.open(out).size == (8, 8)
    asked = StandIn.asked
    assert (asked["prompts"], asked["seed"], asked["num_inference_steps"], asked["sampler"]) == (("a shoe",), 3, 9, "euler")
    assert (asked["guidance_scale"], asked["height"], asked["width"], asked["negative_prompt"], asked["num_images"]) == (
        2,
        None,
        None,
        "",
        1,
    )
    assert asked["bundle"] == bundle


def test_json_tells_files_seeds_times_and_warnings(bundle: Bundle, tmp_path: Path) -> None:
    answer = json.loads(run(bundle, "--prompt", "long", "-o", tmp_path / "a.png", "--json").stdout)
    assert answer["files"] == [str(tmp_path / "a.png")]
    assert answer["seeds"] == [0]
    assert answer["step_ms"] == [2.0, 2.0]
    assert "too long" in answer["warnings"][0]


def test_a_cut_prompt_is_told_on_stderr(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, "--prompt", "long", "-o", tmp_path / "a.png")
    assert "Warning: The prompt is too long" in result.stderr
    assert "Warning" not in result.stdout


def test_several_pictures_make_a_grid(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle, "--prompt", "a", "--images", 3, "-o", tmp_path / "a.png")
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.size == (20, 20)
    assert [sheet.getpixel(at) for at in ((0, 0), (12, 0), (0, 12), (12, 12))] == [(0, 0, 0), (40, 40, 40), (80, 80, 80), (255, 255, 255)]


def test_or_numbered_files(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, "--prompt", "a", "--prompt", "b", "--layout", "files", "-o", tmp_path / "a.png")
    assert result.stdout.split() == [str(tmp_path / "a-1.png"), str(tmp_path / "a-2.png")]
    assert not (tmp_path / "a.png").exists()


def test_a_picture_that_exists_is_kept_unless_forced(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    out.write_text("precious", encoding="utf-8")
    assert "exists already" in run(bundle, "--prompt", "a", "-o", out, code=1).stderr
    assert out.read_text(encoding="utf-8") == "precious"
    assert StandIn.asked == {}, "refused before the work is done"
    run(bundle, "--prompt", "a", "-o", out, "--force")
    assert Image.open(out).size == (8, 8)


def test_a_folder_is_not_replaced_even_when_forced(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert "exists already" in run(bundle, "--prompt", "a", "-o", tmp_path / "a.png", "--force", code=1).stderr


def test_a_name_that_is_no_picture_is_refused_before_the_work(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, "--prompt", "a", "-o", tmp_path / "a.txt", code=2)
    assert "does not end like a picture. Allowed: .png, .jpg, .jpeg, .webp." in result.stderr
    assert StandIn.asked == {}


def test_what_cannot_be_drawn_is_refused_before_anything_is_loaded(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, "--prompt", "a", "--height", 33, "-o", tmp_path / "a.png", code=2)
    assert "The size of the picture cannot be used. Got: 33 x 32 (height x width)." in result.stderr
    assert StandIn.asked == {}


def test_what_the_pipeline_refuses_is_told_and_nothing_written(bundle: Bundle, tmp_path: Path) -> None:
    result = run(bundle, "--prompt", "a", "--correction", "other.json", "-o", tmp_path / "a.png", code=2)
    assert "The correction was measured for another bundle." in result.stderr
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_picture_formats(bundle: Bundle, tmp_path: Path, suffix: str) -> None:
    run(bundle, "--prompt", "a", "-o", tmp_path / f"a{suffix}")
    assert Image.open(tmp_path / f"a{suffix}").size == (8, 8)


def test_one_picture_is_no_grid() -> None:
    picture = Image.new("RGB", (8, 8))
    assert grid([picture]) is picture
