"""``edgediffusion compare``: what it hands on, what it prints, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgediffusion.bundle import Bundle
from edgediffusion.cli import main
from edgediffusion.profiles import quality
from tests.runtimes.tiny import SAMPLING, write_bundle


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("pair")
    return write_bundle(folder / "near", sampling=replace(SAMPLING, latent_scale=0.55)), write_bundle(folder / "float")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red shirt\n\n  a blue shoe \n", encoding="utf-8")
    return file


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_table(pair: tuple[Bundle, Bundle], prompts: Path) -> None:
    result = run(*(b.path for b in pair), "--prompts", prompts, "--samples", 3)
    assert result.stdout.startswith("metric")
    assert "psnr, dB" in result.stdout
    assert "no perceptual: it needs a judge" in result.stdout
    assert "3 steps, guidance 5, seeds from 0, 2 prompts in turn" in result.stdout
    assert "drawing" in result.stderr


def test_json(pair: tuple[Bundle, Bundle], prompts: Path) -> None:
    answer = json.loads(run(*(b.path for b in pair), "--prompts", prompts, "--samples", 3, "--steps", 2, "--json").stdout)
    assert answer["pictures"] == 3
    assert [score["metric"] for score in answer["pairs"]] == ["psnr", "ssim"]
    assert 0 < answer["pairs"][0]["worst"] <= answer["pairs"][0]["median"] < 150
    assert answer["run"]["steps"] == 2
    assert answer["run"]["reference"] == str(pair[1].path)


def test_arguments_are_handed_on(pair: tuple[Bundle, Bundle], prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def stand_in(bundle: Bundle, reference: Bundle, **settings: Any) -> quality.Quality:
        asked.update(settings, bundle=bundle.path, reference=reference.path)
        return quality.Quality(2, None, 0, 1, (), (), {}, quality.Run("a", "b", 1, 0, 1, 1, 1.0, 1.0, ("it was cut",)))

    monkeypatch.setattr(quality, "compare", stand_in)
    paths = [b.path for b in pair]
    settings = (
        "--samples",
        4,
        "--steps",
        5,
        "--guidance-scale",
        2,
        "--seed",
        6,
        "--target",
        "onnx",
        "--judge",
        "fashion",
        "--cache",
        "fora",
    )
    result = run(*paths, "--prompts", prompts, *settings)
    assert "Warning: it was cut\n" in result.stderr
    assert asked.pop("judge").name == "fashion"
    assert asked.pop("progress")
    numbers = {"samples": 4, "steps": 5, "guidance_scale": 2.0, "seed": 6, "target": "onnx", "cache": "fora"}
    assert asked == {"bundle": paths[0], "reference": paths[1], "prompts": ("a red shirt", "a blue shoe"), **numbers}


def test_prompts_may_come_from_standard_input(pair: tuple[Bundle, Bundle]) -> None:
    arguments = ["compare", *(str(b.path) for b in pair), "--prompts", "-", "--samples", "2", "--steps", "1"]
    result = CliRunner().invoke(main, arguments, input="a cat\n")
    assert result.exit_code == 0, result.output
    assert "1 prompts in turn" in result.stdout


def test_without_prompts_it_says_what_to_give(pair: tuple[Bundle, Bundle]) -> None:
    result = run(*(b.path for b in pair), code=2)
    assert "Give some (--prompts), or a judge with its own (--judge)." in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("content", "message"), [(b"\n \n", "is empty"), (b"\xff\xfe\x00", "is not UTF-8 text")])
def test_a_file_of_prompts_that_cannot_be_used(pair: tuple[Bundle, Bundle], tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(content)
    result = run(*(b.path for b in pair), "--prompts", file, code=2)
    assert message in result.stderr
    assert "prompts" in result.stderr


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--judge", "nobody"), "No judge is called 'nobody'. Allowed: fashion.", 2),
        (("--samples", "1"), "--samples", 2),
        (("--seed", "-1"), "--seed", 2),
        (("--target", "toaster"), "toaster", 2),
    ],
)
def test_options_that_cannot_be_used(pair: tuple[Bundle, Bundle], prompts: Path, options: tuple[str, ...], message: str, code: int) -> None:
    assert message in run(*(b.path for b in pair), "--prompts", prompts, *options, code=code).stderr


def test_a_folder_that_is_no_bundle(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    for arguments in ((pair[0].path, tmp_path), (tmp_path, pair[0].path)):
        assert "is not a bundle" in run(*arguments, "--judge", "fashion", code=1).stderr
