"""The command line: every file of this folder that does not begin with an underscore is a command.

A command parses its arguments, calls one library function and prints; whatever it needs is imported when it runs, so
``--help`` loads click and nothing else. What goes wrong becomes one line on stderr in one place: ``_errors.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from edgediffusion import __version__
from edgediffusion.cli._errors import exit_code
from edgediffusion.errors import UnknownName
from edgediffusion.registry import find, names

PROGRAM = "edgediffusion"


class Commands(click.Group):
    """A group whose commands are the files of this folder, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(names("cli"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in names("cli"):
            return None
        command: click.Command = find("cli", cmd_name).command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and args[0] not in names("cli"):
            raise UnknownName("command", args[0], names("cli"))
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command and end the process with its exit code; errors are told in one line."""
        extra["standalone_mode"] = False
        sys.exit(exit_code(lambda: super(Commands, self).main(args, PROGRAM, *rest, **extra)))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=PROGRAM)
def main() -> None:
    """Turn a trained diffusion pipeline into engines for a named device, run them there without torch, and say how long
    every part takes.

    \b
    Example:
      edgediffusion export my-pipeline -o bundle
      edgediffusion build bundle --target cpu-x86-64 -o engines
      edgediffusion run engines --prompt "a red heart" -o heart.png
    """
