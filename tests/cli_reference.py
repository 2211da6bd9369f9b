"""docs/cli.md, made from the commands: ``python -m tests.cli_reference --write``. A test compares the two."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgediffusion.cli import PROGRAM, main
from edgediffusion.registry import names

FILE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Commands

Made from the commands themselves by `scripts/docs`; do not edit.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done; 1 it could not be done; 2 the arguments cannot
be used; 70 a bug (set `EDGEDIFFUSION_DEBUG=1` to see where); 130 stopped by Ctrl-C or SIGTERM.
"""


def reference() -> str:
    context = click.Context(main, info_name=PROGRAM, terminal_width=100, **{**main.context_settings, "max_content_width": 100})
    parts = [HEAD, f"```text\n{main.get_help(context)}\n```\n"]
    for name in names("cli"):
        command = main.get_command(context, name)
        assert command is not None
        text = command.get_help(click.Context(command, info_name=name, parent=context))
        parts.append(f"## {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(reference(), encoding="utf-8")
    else:
        sys.exit("usage: python -m tests.cli_reference --write")
