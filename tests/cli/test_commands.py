"""What each command hands to its library function, and what it prints of the answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgediffusion import targets
from edgediffusion.bundle import Bundle
from edgediffusion.cli import main
from edgediffusion.cli._progress import Progress

Make = Callable[[Path], Bundle]


@dataclass(frozen=True)
class Answer:
    name: str = "answer"
    error_db: float = 41.23456
    rows: tuple[dict[str, float], ...] = ({"largest_error": 0.25},)


class Library:
    """Stands for the library functions: remembers how it was called, and answers what it was told to."""

    def __init__(self, answer: object):
        self.answer = answer
        self.arguments: tuple[Any, ...] = ()
        self.settings: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **settings: Any) -> object:
        self.arguments, self.settings = arguments, settings
        if "progress" in settings:
            settings.pop("progress")("working", 1.0)
        if "announce" in settings:
            settings.pop("announce")(Answer("4 GB"))
        return self.answer


@pytest.fixture
def bundle(tmp_path: Path, make_bundle: Make) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def library(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Library]:
    def put(module: str, name: str, answer: object = bundle, **others: object) -> Library:
        fake = ModuleType(module)
        stand_in = Library(answer)
        for key, value in {name: stand_in, **others}.items():
            setattr(fake, key, value)
        monkeypatch.setitem(sys.modules, module, fake)
        return stand_in

    return put


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(("flag", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_export(library: Callable[..., Library], bundle: Bundle, flag: str, dtype: str) -> None:
    export = library("edgediffusion.export", "export")
    result = run("export", "source", "-o", "out", "--dtype", flag, "--opset", 20, "--weights", "copy")
    assert export.arguments == (Path("source"), Path("out"))
    plain = {"cuts": (), "row_timesteps": False, "keep_float32": (), "loras": (), "target": None}
    assert export.settings == {"dtype": dtype, "opset": 20, "weights": "copy", **plain}
    assert result.stdout.startswith("out: text_encoder, unet; ")
    assert "working" in result.stderr
    answer = json.loads(run("export", "source", "-o", "out", "--json").stdout)
    assert answer["digest"] == bundle.digest
    assert answer["components"] == ["text_encoder", "unet"]
    assert answer["estimate"]["name"] == "4 GB"
    assert "4 GB" in result.stderr


def test_export_changes_weights(library: Callable[..., Library], bundle: Bundle) -> None:
    export = library("edgediffusion.export", "export")
    loras = ("--lora", "ink.safetensors:0.8", "--lora", "plain.safetensors", "--lora", "c:/odd:-1")
    run("export", "source", "-o", "out", *loras, "--keep-fp32", "vae", "--keep-fp32", "unet.mid_block", "--target", "l4")
    assert export.settings["loras"] == (("ink.safetensors", 0.8), ("plain.safetensors", 1.0), ("c:/odd", -1.0))
    assert (export.settings["keep_float32"], export.settings["target"]) == (("vae", "unet.mid_block"), "l4")


def test_overflow(library: Callable[..., Library], bundle: Bundle) -> None:
    @dataclass(frozen=True)
    class Found:
        keep: tuple[str, ...]

    find = library("edgediffusion.optimize.overflow", "find_overflow", Found(("vae.decoder", "unet.mid_block")))
    result = run("overflow", bundle.path, "--prompt", "a shoe", "--steps", 4)
    assert (find.arguments, find.settings) == ((bundle,), {"prompts": ("a shoe",), "steps": 4, "seed": 0})
    assert result.stdout.endswith("\n--keep-fp32 vae.decoder --keep-fp32 unet.mid_block\n")
    find.answer = Found(())
    assert "no --keep-fp32 is needed" in run("overflow", bundle.path).stdout


def test_calibrate(library: Callable[..., Library], bundle: Bundle, tmp_path: Path) -> None:
    state = SimpleNamespace(digest="abc", layers={"conv_in": 1}, calibration={}, recipe={"name": "int8"})
    calibrate = library("edgediffusion.optimize", "calibrate", state)
    (tmp_path / "prompts").write_text("a shoe\n\n  a bag \n", encoding="utf-8")
    strategy = ("--strategy", "ndtc", "--option", "clip=resample", "--option", "std_part=0.35")
    settings = ("--samples", 3, "--steps", 4, "--seed", 5, "--prompts", tmp_path / "prompts", "--guidance-scale", 2)
    result = run("calibrate", bundle.path, "--source", "pipeline", *strategy, *settings, "-o", "state")
    assert calibrate.arguments == (bundle,)
    tell = calibrate.settings.pop("tell")
    assert calibrate.settings == {
        "source": Path("pipeline"),
        "output": Path("state"),
        "prompts": ("a shoe", "a bag"),
        "recipe": "int8",
        "strategy": "ndtc",
        "options": {"clip": "resample", "std_part": "0.35"},
        "samples": 3,
        "steps": 4,
        "seed": 5,
        "guidance_scale": 2.0,
        "cache": None,
        "sampler": None,
    }
    assert result.stdout == "state: 1 layers for the recipe int8\n"
    assert callable(tell)
    run("calibrate", bundle.path, "-o", "state")
    assert calibrate.settings["source"] is None
    assert calibrate.settings["prompts"] is None


def test_quantize(library: Callable[..., Library], bundle: Bundle) -> None:
    quantize = library("edgediffusion.optimize", "quantize")
    run("quantize", bundle.path, "--state", "state", "-o", "out")
    assert quantize.arguments == (bundle, Path("state"), Path("out"))
    assert quantize.settings == {"recipe": None, "target": "cpu-x86-64", "placement": None, "sensitivity": None}


def test_build(library: Callable[..., Library], bundle: Bundle) -> None:
    build = library("edgediffusion.runtimes.build", "build")
    run("build", bundle.path, "--target", "cpu-x86-64", "-o", "out")
    assert build.arguments == (bundle, Path("out"))
    asked = {"target": "cpu-x86-64", "threads": None, "precision": None, "shapes": "", "timing_cache": None, "reuse": None}
    assert build.settings == {**asked, "pick": "order", "max_error": 1e-3}
    run("build", bundle.path, "--target", "auto", "--precision", "bfloat16", "--shapes", "batch=1:2:4", "--threads", 1, "-o", "out")
    assert build.settings == {
        **asked,
        "target": "auto",
        "precision": "bfloat16",
        "shapes": "batch=1:2:4",
        "threads": 1,
        "pick": "order",
        "max_error": 1e-3,
    }


def test_validate(library: Callable[..., Library], bundle: Bundle) -> None:
    validate = library("edgediffusion.export.validate", "validate", Answer())
    monkey = library("edgediffusion.export", "export")
    result = run("validate", bundle.path, "--source", "pipeline", "--prompt", "a", "--prompt", "b")
    assert validate.arguments == (bundle, Path("pipeline"))
    assert validate.settings["prompts"] == ("a", "b")
    assert result.stdout == "name: answer\nerror db: 41.23\n\nrows\nlargest error\n-------------\n         0.25\n"
    assert not monkey.arguments
    answer = json.loads(run("validate", bundle.path, "--source", "pipeline", "--json").stdout)
    assert answer == {"name": "answer", "error_db": 41.23456, "rows": [{"largest_error": 0.25}]}


def test_profile(library: Callable[..., Library], bundle: Bundle) -> None:
    profile = library("edgediffusion.profiles", "profile", Answer())
    library("edgediffusion.profiles.report", "profile_table", "the table")
    assert run("profile", bundle.path, "--runs", 7, "--warmup", 0).stdout == "the table\n"
    assert profile.settings == {"target": None, "runs": 7, "warmup": 0, "steps": 2, "cache": None}


def test_demo(library: Callable[..., Library], tmp_path: Path) -> None:
    demo = library("edgediffusion.cli._demo", "demo", "what it made")
    assert run("demo", "-o", tmp_path / "demo").stdout == "what it made\n"
    assert demo.arguments[0] == tmp_path / "demo"
    assert isinstance(demo.arguments[1], Progress)


def test_targets() -> None:
    lines = {line.split()[0]: line for line in run("targets").stdout.splitlines()}
    assert " onnxruntime, openvino " in lines["cpu-x86-64"]
    assert lines["jetson-orin-nano"].split()[-5:] == ["68", "20", "10?", "87", "15?"]  # '?': no page confirms it
    assert [t["name"] for t in json.loads(run("targets", "--json").stdout)] == list(targets.names())
    one = run("targets", "rtx-4090").stdout
    assert "peak tops.int8" in one
    assert "660.6" in one
    assert json.loads(run("targets", "rtx-4090", "--json").stdout)["peak_tops"]["int8"] == 660.6


@pytest.mark.parametrize("command", ["quantize", "build", "run", "validate", "profile", "inspect", "calibrate"])
def test_a_folder_that_is_no_bundle_is_refused(library: Callable[..., Library], tmp_path: Path, command: str) -> None:
    for module, name in (("export", "export"), ("export.validate", "validate"), ("optimize", "calibrate")):
        library(f"edgediffusion.{module}", name, quantize=None)
    options = {
        "quantize": ("--state", "s", "-o", "out"),
        "build": ("--target", "cpu-x86-64", "-o", "out"),
        "run": ("--prompt", "a", "-o", "out.png"),
        "validate": ("--source", "s"),
        "calibrate": ("--source", "s", "-o", "out"),
    }
    result = run(command, tmp_path, *options.get(command, ()), code=1)
    assert "is not a bundle: it has no bundle.json" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("export",),
        ("export", "source"),
        ("export", "source", "-o", "out", "--dtype", "int3"),
        ("export", "source", "-o", "out", "--opset", "9"),
        ("calibrate", "bundle", "--source", "s", "-o", "o", "--samples", "0"),
        ("build", "bundle", "-o", "out"),
        ("run", "bundle"),
        ("run", "bundle", "--prompt", "a", "-o", "a.png", "--seed", "-1"),
        ("profile", "bundle", "--runs", "none"),
    ],
    ids=" ".join,
)
def test_arguments_that_cannot_be_used_end_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, code=2)
    assert "Error: " in result.stderr
    assert result.stdout == ""
