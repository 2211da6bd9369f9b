from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
    def from_bundle(cls, bundle: Bundle, *, target: str | None = None, cache: str | None = None, max_memory: str | None = None) -> StandIn:
        cls.asked = {"bundle": bundle, "target": target, "max_memory": max_memory}
        return cls()

    def __call__(self, prompts: tuple[str, ...], *, callback: Callable[[Step], object], **options: Any) -> Any:
        if options["correction"] == "other.json":
            raise ArgumentError("The correction was measured for another bundle")
        type(self).asked.update(options, prompts=prompts)
        for index in range(2):
            callback(Step(index, 2))
        count = len(prompts or range(2)) * options["num_images"]

        class Result:
            latents = np.full((count, 4, 2, 2), 0.5, np.float32)
            images = tuple(Image.new("L", (8, 8), 40 * n) for n in range(count))
            timings = Timings()
            seeds = (options["seed"],)
            warnings = ("The prompt is too long; this part of it was left out: 'x'",) if "long" in (prompts or ()) else ()

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
        None,
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


def test_pictures_to_start_from_are_read(bundle: Bundle, tmp_path: Path) -> None:
    for name, shade in (("a", 10), ("b", 20), ("m", 255)):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / f"{name}.png")
    pictures = ("--image", tmp_path / "a.png", "--image", tmp_path / "b.png", "--mask", tmp_path / "m.png")
    run(bundle, "--prompt", "x", "--prompt", "y", *pictures, "--strength", 0.5, "--tile", 16, "-o", tmp_path / "out.png")
    asked = StandIn.asked
    assert [image.getpixel((0, 0))[0] for image in asked["image"]] == [10, 20]
    assert asked["mask_image"].size == (32, 32), "a single one is for all"
    assert (asked["strength"], asked["tile"], asked["guidance_batch"], asked["prompt_weights"]) == (0.5, 16, "joint", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "broken.png"), "cannot be read as a picture"),
        (("--image", "missing.png"), "does not exist"),
        (("--mask", "mask.png"), "A mask needs the picture that it belongs to"),
        (("--image", "a.png", "--mask", "mask.png"), "A mask and its picture have different sizes. Got: 16 x 16 and 32 x 32"),
        (("--image", "a.png", "--strength", 0), "0.0 is not in the range"),
        (("--image", "a.png", "--strength", 0.01, "--steps", 5), "At strength 0.01 no step of 5 is left"),
        (("--image", "a.png", "--image", "a.png"), "A list of pictures has one per prompt. Got: 2 for 1 prompts"),
        (("--tile", 7), "The size of a tile cannot be used. Got: 7. Allowed: multiples of 16 pixels"),
        (("--steps", 1001), "The number of steps cannot be used. Got: 1001. Allowed: 1 to 1000"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_anything_is_loaded(
    bundle: Bundle, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("L", (16, 16)).save(tmp_path / "mask.png")
    (tmp_path / "broken.png").write_text("no picture", encoding="utf-8")
    placed = [tmp_path / a if isinstance(a, str) and a.endswith(".png") else a for a in arguments]
    result = run(bundle, "--prompt", "x", *placed, "-o", tmp_path / "out.png", code=2)
    assert message in " ".join(result.stderr.split())
    assert StandIn.asked == {}
    assert not (tmp_path / "out.png").exists()


def test_a_bundle_with_text_wants_a_prompt(bundle: Bundle, tmp_path: Path) -> None:
    assert "draws what a text says. Say it: --prompt" in run(bundle, "-o", tmp_path / "a.png", code=2).stderr
    assert StandIn.asked == {}


def test_classes_need_no_prompt(tmp_path: Path, make_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "Pipeline", StandIn, raising=False)
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.setattr(Bundle, "with_role", lambda self, role: ())
    result = run(bundle, "--class-label", 3, "--class-label", 7, "--layout", "files", "-o", tmp_path / "a.png")
    assert (StandIn.asked["prompts"], StandIn.asked["class_labels"]) == (None, [3, 7])
    assert len(result.stdout.split()) == 2


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_picture_formats(bundle: Bundle, tmp_path: Path, suffix: str) -> None:
    run(bundle, "--prompt", "a", "-o", tmp_path / f"a{suffix}")
    assert Image.open(tmp_path / f"a{suffix}").size == (8, 8)


def test_one_picture_is_no_grid() -> None:
    picture = Image.new("RGB", (8, 8))
    assert grid([picture]) is picture


def test_pictures_that_lead(bundle: Bundle, tmp_path: Path) -> None:
    for name, shade in (("edges", 10), ("depth", 90)):
        Image.new("L", (8, 8), shade).save(tmp_path / f"{name}.png")
    one = ("--prompt", "a room", "--control-image", tmp_path / "edges.png", "--control-scale", 0.8, "--control-part", "0,0.5")
    run(bundle, *one, "-o", tmp_path / "a.png")
    asked = StandIn.asked
    assert asked["control_image"].getpixel((0, 0)) == 10
    assert (asked["controlnet_conditioning_scale"], asked["control_guidance_start"], asked["control_guidance_end"]) == (0.8, 0.0, 0.5)
    run(bundle, *one[:6], "--control-image", tmp_path / "depth.png", "--control-scale", 0.5, "-o", tmp_path / "b.png")
    assert [picture.getpixel((0, 0)) for picture in StandIn.asked["control_image"]] == [10, 90]
    assert list(StandIn.asked["controlnet_conditioning_scale"]) == [0.8, 0.5]
    refused = run(bundle, "--prompt", "a", "--control-part", "0.5", "-o", tmp_path / "c.png", code=2)
    assert "--control-part takes two numbers" in refused.output


def test_sizes_that_a_network_is_told(bundle: Bundle, tmp_path: Path) -> None:
    sizes = ("--original-size", "100,200", "--crop", "3,4", "--target-size", "5,6")
    run(bundle, "--prompt", "a room", *sizes, "-o", tmp_path / "a.png")
    asked = StandIn.asked
    assert (asked["original_size"], asked["crops_coords_top_left"], asked["target_size"]) == ((100, 200), (3, 4), (5, 6))


def test_texts_for_further_encoders(bundle: Bundle, tmp_path: Path) -> None:
    further = ("--prompt-2", "c", "--prompt-3", "d", "--prompt-3", "e", "--negative-prompt-2", "f")
    run(bundle, "--prompt", "a", "--prompt", "b", *further, "-o", tmp_path / "a.png")
    names = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
    assert [StandIn.asked[name] for name in names] == ["c", ["d", "e"], None, "f", None]


def test_latents_go_from_one_network_to_another(bundle: Bundle, tmp_path: Path) -> None:
    left = tmp_path / "left.npy"
    result = run(bundle, "--prompt", "a", "--images", 2, "--layout", "files", "--denoising-end", 0.8, "-o", left)
    assert result.stdout == f"{left}\n"
    assert np.load(left).shape == (2, 4, 2, 2)
    np.save(tmp_path / "sized.npy", np.zeros((1, 4, 8, 8), np.float32))
    run(bundle, "--prompt", "a", "--image", tmp_path / "sized.npy", "--denoising-start", 0.8, "-o", tmp_path / "a.png")
    assert (StandIn.asked["image"].shape, StandIn.asked["denoising_start"]) == ((1, 4, 8, 8), 0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--denoising-end", 0.8, "-o", "a.png"), "What --denoising-end leaves is no picture"),
        (("-o", "a.npy"), "does not end like a picture"),
        (("--denoising-end", 1, "-o", "a.npy"), "1.0 is not in the range 0<x<1"),
        (("--denoising-start", 0.8, "-o", "a.png"), "takes what another network left. Got: 0 times --image"),
        (("--denoising-start", 0.8, "--image", "picture.png", "-o", "a.png"), "cannot be read as latents"),
        (("--denoising-start", 0.8, "--image", "objects.npy", "-o", "a.png"), "cannot be read as latents. Got: Object arrays"),
        (("--denoising-start", 0.8, "--image", "cut.npy", "-o", "a.png"), "cannot be read as latents"),
        (("--denoising-start", 0.8, "--image", "flat.npy", "-o", "a.png"), "latents and no picture, as image. Got: float64 (3,)"),
        (("--denoising-start", 0.8, "--strength", 0.5, "--image", "flat.npy", "-o", "a.png"), "Got: denoising_start and strength"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(bundle: Bundle, tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:-9])
    placed = [tmp_path / a if isinstance(a, str) and a.endswith((".png", ".npy")) else a for a in arguments]
    result = run(bundle, "--prompt", "x", *placed, code=2)
    assert message in " ".join(result.stderr.split())
    assert StandIn.asked == {}
    assert not (tmp_path / "a.png").exists()
    assert not (tmp_path / "a.npy").exists()
