from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgediffusion.cli._errors import DEBUG, EXTRAS, exit_code
from edgediffusion.errors import ArgumentError, BundleError, Cancelled, EngineError, MissingExtra, OutputError, SourceError, UnknownName

ERRORS = [
    (SourceError("It is no pipeline"), 1, "Error: It is no pipeline."),
    (BundleError("It is damaged"), 1, "Error: It is damaged."),
    (OutputError("It exists"), 1, "Error: It exists."),
    (EngineError("It refused"), 1, "Error: It refused."),
    (MissingExtra("torch", "export", "Exporting"), 1, "Install it with: pip install 'edgediffusion[export]'"),
    (ArgumentError("It is too big"), 2, "Error: It is too big."),
    (UnknownName("sampler", "x", ["ddim"]), 2, "Allowed: ddim."),
    (Cancelled("Stopped after step 3"), 130, "Cancelled; nothing was kept."),
    (KeyboardInterrupt(), 130, "Cancelled; nothing was kept."),
    (click.UsageError("--steps is missing"), 2, "Error: --steps is missing"),
    (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "pip install 'edgediffusion[export]'"),
    (ModuleNotFoundError("No module named 'modelopt.torch'", name="modelopt.torch"), 1, "pip install 'edgediffusion[optimize]'"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.json"), 1, "Error: 'gone.json': No such file or directory."),
    (PermissionError(errno.EACCES, "Permission denied", "locked"), 1, "Error: 'locked': Permission denied."),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "Error: No space left on device."),
    (MemoryError(), 1, "not enough free memory"),
    (ValueError("first line\nsecond line"), 70, "This is a bug in edgediffusion. Got: ValueError: first line."),
    (AssertionError(), 70, f"Set {DEBUG}=1 to see where it happened"),
    (ModuleNotFoundError("No module named 'edgediffusion.nope'", name="edgediffusion.nope"), 70, "This is a bug"),
]


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEBUG, raising=False)


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "message"), ERRORS, ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else ""
)
def test_an_error_is_one_line_on_stderr_and_a_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(lambda: fail(error)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_shows_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "1")
    assert exit_code(lambda: fail(ValueError("no"))) == 70
    assert "Traceback" in capsys.readouterr().err


def test_an_end_of_file_inside_the_library_is_not_taken_for_a_cancelling(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        raise EOFError("the archive ends early")

    assert exit_code(lambda: command.main([], standalone_mode=False)) == 70
    assert "EOFError: the archive ends early" in capsys.readouterr().err


def test_success_is_zero_and_a_number_is_the_code() -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3


def test_every_optional_library_has_an_extra_of_the_package() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in pyproject for extra in set(EXTRAS.values()))


# The first line: a shell's background jobs, such as a test run of that kind, pass on that SIGINT is ignored.
LONG_COMMAND = """
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
import sys, time, types
from pathlib import Path
fake = types.ModuleType("edgediffusion.export")
def export(source, output, **settings):
    from edgediffusion.files import new_folder
    with new_folder(output) as folder:
        (folder / "half").write_text("x")
        print("working", flush=True)
        if sys.argv[2] == "hang":
            time.sleep(60)
    sys.exit(0)
fake.export = export
sys.modules["edgediffusion.export"] = fake
from edgediffusion.cli import main
main(["export", "source", "-o", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_command_and_keeps_nothing(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LONG_COMMAND, str(out), "hang"], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "Cancelled; nothing was kept."
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run([sys.executable, "-c", LONG_COMMAND, str(out), "finish"], capture_output=True, check=False).returncode == 0
    assert out.is_dir()


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-c", "from edgediffusion.cli import main; main(['--help'])"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert result.returncode == 1
    assert result.stderr == ""
