from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgediffusion import registry
from edgediffusion.errors import MissingExtra, UnknownName


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in ("two_words.py", "plain.py", "_private.py", "facts.toml"):
        (folder / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(registry, "_ROOT", tmp_path)
    return folder


def test_names_are_the_files_that_do_not_begin_with_an_underscore(shelf: Path) -> None:
    assert registry.names("shelf") == ("plain", "two-words")
    assert registry.names("shelf", ".toml") == ("facts",)


def test_a_new_file_is_an_entry_at_once(shelf: Path) -> None:
    (shelf / "newcomer.py").write_text("", encoding="utf-8")
    assert "newcomer" in registry.names("shelf")


def test_an_unknown_entry_is_refused_with_the_known_ones(shelf: Path) -> None:
    with pytest.raises(UnknownName, match=r"No shelve is called 'plane'. Allowed: plain, two-words. Did you mean 'plain'\?"):
        registry.find("shelf", "plane", kind="shelve")


@pytest.mark.parametrize("name", ["_private", "../plain", "shelf.plain", "", "two_words"])
def test_only_listed_names_are_imported(shelf: Path, name: str) -> None:
    with pytest.raises(UnknownName):
        registry.find("shelf", name)


def test_the_kind_is_the_folder_in_the_singular() -> None:
    with pytest.raises(UnknownName, match="No sampler is called"):
        registry.find("runtimes.samplers", "nope")


def test_find_imports_the_file_of_the_name() -> None:
    assert registry.find("cli", "targets").__name__ == "edgediffusion.cli.targets"


def test_listing_imports_nothing() -> None:
    code = "import sys; from edgediffusion.registry import names; names('cli'); print([m for m in sys.modules if 'edgediffusion.cli' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_require_names_the_extra_of_a_missing_library() -> None:
    with pytest.raises(MissingExtra, match=r"edgediffusion\[tensorrt\]"):
        registry.require("no_such_engine", extra="tensorrt", purpose="Building")
    with pytest.raises(MissingExtra):
        registry.require("no_such_engine.deeper", extra="tensorrt", purpose="Building")


def test_require_passes_on_what_an_installed_library_lacks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import its_own_missing_part", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="its_own_missing_part"):
        registry.require("half_installed", extra="cpu", purpose="Running")


def test_require_returns_the_library() -> None:
    assert registry.require("json", extra="cpu", purpose="x").__name__ == "json"
