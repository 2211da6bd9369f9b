"""``edgediffusion fit``: what it prints and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgediffusion.bundle import Bundle
from edgediffusion.cli import main
from edgediffusion.profiles.fit import Fit
from tests.runtimes.tiny import write_bundle

TOML = """
summary = "a processor"
device = "cpu"
architecture = "x86-64"
systems = ["linux"]
engines = ["onnxruntime"]
formats = ["float32", "int8"]
placement = "onnxruntime-cpu"
opset = 23
memory_gb = 2
bandwidth_gb_s = 20
unverified = ["memory_gb", "bandwidth_gb_s", "peak_tops"]
peak_tops = { float32 = 0.2, int8 = 0.8 }
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("fit") / "bundle")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(TOML, encoding="utf-8")
    return file


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def test_the_table_of_a_target_of_ones_own(bundle: Bundle, target: Path) -> None:
    text = run("fit", bundle.path, "--target", target, "--steps", 5).stdout
    assert text.startswith("mine: 16 x 16 pixels, 5 steps, one picture at a time")
    assert [line.split()[0] for line in text.splitlines()[4:7]] == ["text_encoder", "unet", "vae_decoder"]
    assert "It fits." in text
    assert "no page confirms: memory_gb, bandwidth_gb_s, peak_tops" in text


def test_json_has_every_field(bundle: Bundle, target: Path) -> None:
    answer = json.loads(run("fit", bundle.path, "--target", target, "--json").stdout)
    assert set(answer) == set(Fit.__dataclass_fields__)
    assert answer["fits"] is True
    assert answer["available_bytes"] == 2 << 30


def test_the_same_answer_twice(bundle: Bundle, target: Path) -> None:
    assert run("fit", bundle.path, "--target", target).stdout == run("fit", bundle.path, "--target", target).stdout


def test_says_what_was_traded(bundle: Bundle, target: Path) -> None:
    text = run("fit", bundle.path, "--target", target, "--max-memory", "1MB", "--batch", 2).stdout
    assert "It does not fit" in text
    assert "1 at a time" in text


def test_this_machine(bundle: Bundle) -> None:
    assert "It fits." in run("fit", bundle.path, "--target", "cpu-x86-64").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "toaster"), "No target is called 'toaster'"),
        (("--target", "cpu-arm64"), "lacks facts that an estimate takes"),
        (("--target", "intel-npu"), "is not known"),
        (("--target", "rtx-4090", "--max-memory", "much"), "An amount of memory cannot be read"),
        (("--target", "rtx-4090", "--width", "3"), "The width cannot be drawn"),
        (("--target", "rtx-4090", "--batch", "0"), "--batch"),
    ],
)
def test_refusals(bundle: Bundle, arguments: tuple[str, ...], message: str) -> None:
    assert message in run("fit", bundle.path, *arguments, code=2).output


def test_needs_a_bundle(tmp_path: Path) -> None:
    assert "is not a bundle" in run("fit", tmp_path, "--target", "rtx-4090", code=1).output
