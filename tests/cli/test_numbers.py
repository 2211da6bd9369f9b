"""Options that take several numbers with commas between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgediffusion.cli import _draw, main

OPTIONS = {"--timesteps": "timesteps", "--guidance-interval": "guidance_interval", "--dynamic-threshold": "dynamic_threshold"}


@pytest.mark.parametrize("option", OPTIONS)
def test_reach_the_library_as_numbers(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def draw(**options: Any) -> _draw.Drawn:
        seen.update(options)
        return _draw.Drawn(("a.png",), ("a bag",), (0,), 1.0, (1.0,), 1.0, ())

    monkeypatch.setattr(_draw, "draw", draw)
    arguments = ["run", str(tmp_path), "--prompt", "a bag", "-o", str(tmp_path / "a.png")]
    result = CliRunner().invoke(main, [*arguments, option, "3, 0.5"])
    assert result.exit_code == 0, result.output
    assert seen[OPTIONS[option]] == (3.0, 0.5)
    CliRunner().invoke(main, arguments)
    assert seen[OPTIONS[option]] is None


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("text", ["a,b", "1,,2", ""])
def test_other_texts_are_refused(option: str, text: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", str(tmp_path), "--prompt", "a bag", "-o", str(tmp_path / "a.png"), option, text])
    assert result.exit_code == 2
    assert "is not a list of numbers with commas between them" in result.output
    assert "Traceback" not in result.output
