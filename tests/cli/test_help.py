from __future__ import annotations

import pytest
from click.testing import CliRunner

from edgediffusion import __version__
from edgediffusion.cli import main
from edgediffusion.registry import names

COMMANDS = names("cli")


def test_all_commands_of_the_product_are_there() -> None:
    assert set(COMMANDS) >= {
        *("export", "calibrate", "quantize", "build", "run", "validate"),
        *("profile", "inspect", "doctor", "demo", "targets"),
    }


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_begins_with_the_command(command: str, flag: str) -> None:
    result = CliRunner().invoke(main, [command, flag])
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines()]
    assert lines[lines.index("Example:") + 1].startswith(f"edgediffusion {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_answer_in_json(command: str) -> None:
    assert "--json" in CliRunner().invoke(main, [command, "--help"]).output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    found = main.get_command(None, command)  # type: ignore[arg-type]  # the folder is looked up, not the context
    assert found is not None
    assert [p.name for p in found.params if p.param_type_name == "option" and not getattr(p, "help", None)] == []


def test_the_list_of_commands_is_not_cut_short() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    assert "..." not in output.partition("Commands:")[2]
    assert all(f"\n  {command} " in output for command in COMMANDS)


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"edgediffusion, version {__version__}\n"


def test_an_unknown_command_is_refused_with_the_near_one() -> None:
    result = CliRunner().invoke(main, ["quantise"])
    assert result.exit_code == 2
    assert "No command is called 'quantise'." in result.stderr
    assert result.stderr.endswith("Did you mean 'quantize'?\n")
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["_draw", "__init__", "../registry"])
def test_files_that_are_no_commands_cannot_be_called(name: str) -> None:
    assert CliRunner().invoke(main, [name]).exit_code == 2
