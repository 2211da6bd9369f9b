from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import edgediffusion
from edgediffusion.registry import names
from tests.cli_reference import FILE, reference

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tracked() -> list[Path]:
    """Files that are in the repository, or in the folder where there is no repository (an unpacked archive)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return [ROOT / name for name in listed.split("\0") if name] or [p for p in ROOT.rglob("*") if p.is_file()]


def test_the_reference_of_the_commands_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == reference(), "run scripts/docs"


def test_the_two_commands_of_the_readme_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in ("./scripts/demo", "./scripts/test"):
        assert f"\n{script}\n" in text
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} cannot be executed"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_that_a_document_shows_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    shown = {match for block in blocks for match in re.findall(r"^\s*edgediffusion ([a-z-]+)", block, re.M)}
    assert shown <= set(names("cli"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_of_a_document_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == edgediffusion.__version__


def test_no_path_of_the_machine_that_made_it_is_in_a_file() -> None:
    pattern = re.compile("|".join(["/wor" + "k/", "/ro" + "ot/", r"/home/\w+/", r"/Users/\w+/", r"[A-Z]:\\Users"]).encode())
    assert [str(p.relative_to(ROOT)) for p in tracked() if p.is_file() and pattern.search(p.read_bytes())] == []


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "README.md" and f"({p.name})" not in index] == []
