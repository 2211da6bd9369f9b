"""``edgediffusion tune-cache``: what it prints, draws and refuses; and ``--cache`` of the commands that draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgediffusion.bundle import Bundle
from edgediffusion.cli import main
from tests.runtimes.cuts import CUT, write_cut_unet

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_cut_unet(tmp_path_factory.mktemp("cut") / "unet")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red shirt\na blue shoe\n", encoding="utf-8")
    return file


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


POLICIES = ("--policy", "deepcache:interval=2", "--policy", "deepcache:interval=4", "--samples", 2, "--steps", 5)


def test_the_table_and_the_picture(bundle: Bundle, prompts: Path, tmp_path: Path) -> None:
    picture = tmp_path / "changes.png"
    result = run("tune-cache", bundle.path, "--prompts", prompts, *POLICIES, "--quality", 1, "-o", picture)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["time", "whole", "calls", "PSNR", "median", "9", "of", "10", "reach", "worst", "policy"]
    assert any(line.endswith(("deepcache:interval=2", "deepcache:interval=4")) for line in lines)
    assert "2 pictures of 5 calls of the network" in result.stdout
    assert lines[-1].startswith(("--cache deepcache:interval=", "No policy is faster"))  # two graphs of microseconds: who knows
    assert Image.open(picture).size == (2 * 240 + 3 * 16, 240 + 16 + 32)


def test_json_has_every_policy_and_the_changes(bundle: Bundle, prompts: Path) -> None:
    answer = json.loads(run("tune-cache", bundle.path, "--prompts", prompts, *POLICIES, "--quality", 500, "--json").stdout)
    assert {outcome["policy"] for outcome in answer["outcomes"]} == {"deepcache:interval=2", "deepcache:interval=4"}
    assert answer["chosen"] is None
    assert set(answer["changes"]["similarity"]) == {CUT, "prediction"}
    assert len(answer["changes"]["similarity"][CUT]) == 5


def test_says_that_nothing_holds_the_quality(bundle: Bundle, prompts: Path) -> None:
    result = run("tune-cache", bundle.path, "--prompts", prompts, *POLICIES, "--quality", 500)
    assert result.stdout.endswith("No policy is faster with 500 dB for nine of ten pictures.\n")


def test_refuses_a_picture_before_any_work(bundle: Bundle, prompts: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.touch()
    for output, code, message in (
        (tmp_path / "changes.pdf", 2, "not end like a picture. Allowed: .png, .webp"),
        (there, 1, "exists already"),
    ):
        result = run("tune-cache", bundle.path, "--prompts", prompts, *POLICIES, "-o", output, code=code)
        assert message in result.stderr
        assert "watching" not in result.stderr


def test_run_with_a_cache(bundle: Bundle, tmp_path: Path) -> None:
    drawn = {}
    for cache in ("none", "deepcache:interval=1", "deepcache:interval=3"):
        file = tmp_path / f"{cache[-1]}.png"
        run("run", bundle.path, "--prompt", "a red shirt", "--steps", 6, "--cache", cache, "-o", file)
        drawn[cache] = file.read_bytes()
    assert drawn["none"] == drawn["deepcache:interval=1"] != drawn["deepcache:interval=3"]


def test_run_refuses_a_policy_and_writes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    for cache, code, message in (
        ("fora", 1, "kind of network"),
        ("deepcache:interval=x", 2, "a whole number"),
        ("?", 2, "No caching policy"),
    ):
        result = run("run", bundle.path, "--prompt", "a red shirt", "--cache", cache, "-o", tmp_path / "a.png", code=code)
        assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_compare_has_the_cache_for_the_first_bundle(bundle: Bundle, prompts: Path) -> None:
    arguments = ("compare", bundle.path, bundle.path, "--prompts", prompts, "--samples", 2, "--steps", 6, "--json")
    worst = [json.loads(run(*arguments, *more).stdout)["pairs"][0]["worst"] for more in ((), ("--cache", "deepcache:interval=3"))]
    assert worst[0] == 150 > worst[1]


def test_profile_with_a_cache(bundle: Bundle) -> None:
    answer = json.loads(run("profile", bundle.path, "--runs", 1, "--warmup", 0, "--cache", "deepcache", "--json").stdout)
    assert answer["cache"] == "deepcache"
    assert answer["cached_step_ms"] > 0
    assert "with --cache deepcache: " in run("profile", bundle.path, "--runs", 1, "--warmup", 0, "--cache", "deepcache").stdout
