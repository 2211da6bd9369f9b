from __future__ import annotations

import platform
from pathlib import Path

import pytest

from edgediffusion import targets
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.registry import names

ROOT = Path(targets.__file__).parent.parent
GOOD = (ROOT / "targets" / "cpu-x86-64.toml").read_text(encoding="utf-8")


def write(folder: Path, text: str) -> Path:
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return folder / "mine.toml"


@pytest.mark.parametrize("name", targets.names())
def test_every_target_is_complete_and_names_what_exists(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert target.facts, "facts without a source are rumours"
    assert all(fact.source.startswith("https://") for fact in target.facts)
    assert set(target.engines) <= set(names("runtimes.engines"))
    assert target.placement in names("optimize.placements", ".toml")
    assert target.formats
    assert target.opset >= 18


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"No target is called 'toaster'. Allowed: .*cpu-x86-64.* Or give a path ending in .toml."):
        targets.load("toaster")


@pytest.mark.parametrize("name", ["../targets/cpu-x86-64", "", "cpu_x86_64"])
def test_only_listed_names_are_read(name: str) -> None:
    with pytest.raises(UnknownName):
        targets.load(name)


def test_a_path_that_does_not_exist_is_an_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(UnknownName):
        targets.load(tmp_path / "none.toml")


def test_a_file_of_ones_own_is_a_target(tmp_path: Path) -> None:
    assert targets.load(write(tmp_path, GOOD)).name == "mine"
    assert targets.load(str(write(tmp_path, GOOD))).engines == ("onnxruntime",)


WRONG = {
    "unknown key": (GOOD.replace("opset = 23", "opset = 23\ncolour = 'red'"), "has unknown keys. Got: colour. Allowed: summary, device"),
    "missing key": (GOOD.replace("opset = 23\n", ""), "lacks keys. Got: opset"),
    "wrong kind": (GOOD.replace("opset = 23", "opset = 'new'"), "'opset' of the target .* is of the wrong kind. Got: 'new'. Allowed: int"),
    "a word for a list": (GOOD.replace('engines = ["onnxruntime"]', 'engines = "onnxruntime"'), "'engines' of the target"),
    "a truth for a number": (GOOD.replace("opset = 23", "opset = true"), "'opset' of the target"),
    "fact without source": (GOOD + '[[facts]]\nabout = "x"\ntext = "y"\n', "Fact 6 of .* lacks keys. Got: source"),
    "facts that are no tables": (GOOD[: GOOD.index("[[facts]]")] + 'facts = ["x"]\n', "must be tables"),
    "no TOML": ("engines = [", "is not valid TOML"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_with_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        targets.load(write(tmp_path, text))


@pytest.mark.parametrize(("machine", "system"), [("x86_64", "Linux"), ("AMD64", "Windows")])
def test_an_x86_machine_is_recognised(monkeypatch: pytest.MonkeyPatch, machine: str, system: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "system", lambda: system)
    assert targets.detect() == "cpu-x86-64"


def test_a_machine_that_no_target_describes_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "z80")
    with pytest.raises(ArgumentError, match="No known target describes this machine. Got: z80"):
        targets.detect()
