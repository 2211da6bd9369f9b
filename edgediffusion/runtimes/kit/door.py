"""Builds this kit's engines on the device that it is for. In the folder that the tar was unpacked to:

    python3 build_here.py                 check the device, build, verify, measure, and write the bundle with its engines
    python3 build_here.py check           the checks alone; build, verify and profile end behind these steps

It needs Python 3.10 or newer with NumPy and the target's engine library, and no network. A run that was stopped goes on where it was.
"""

# This file is copied into kits and started by whatever Python a device has: it must say so itself where that one is too old.
import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

OLDEST = (3, 10)
FAILED, BUG, CANCELLED = 1, 70, 130
STEPS = ("check", "build", "verify", "profile", "results")


class Refused(Exception):
    """What is wrong before the package can say so."""


def main() -> int:
    here = Path(__file__).resolve().parent
    try:
        if sys.version_info < OLDEST:
            found = ".".join(map(str, sys.version_info[:3]))
            raise Refused(
                f"This Python is too old. Got: {found}. Allowed: 3.10 and newer. "
                "JetPack 6 has 3.10; JetPack 5 has 3.8 and no TensorRT that this kit can use."
            )
        asked = arguments(here)
        runtime = unpacked(here, asked.work)
        try:
            import numpy  # noqa: F401
        except ImportError as error:
            raise Refused(f"NumPy cannot be used by this Python. Got: {error}. Install it with: pip install numpy") from None
        sys.path.insert(0, str(runtime))
        return take_steps(here, asked)
    except Refused as problem:
        return say_error(str(problem), FAILED)
    except KeyboardInterrupt:
        return say_error("Cancelled; what was built is kept, and the next run goes on from there.", CANCELLED)


def arguments(here: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=STEPS, default=STEPS[-1], help="the step to end with; all are taken by default")
    parser.add_argument("-o", "--output", type=Path, default=here / "built", help="the bundle to write; it must not exist")
    parser.add_argument("--work", type=Path, default=here / "work", help="where engines are kept until all are there")
    parser.add_argument("--workspace-mb", type=int, default=None, help="memory for one kernel; a quarter of what is available by default")
    parser.add_argument("--runs", type=int, default=30, help="timed calls of each engine")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="read the system's files from this folder: a recorded device, for tests"
    )
    asked = parser.parse_args()
    for name in ("workspace_mb", "runs"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise Refused(f"--{name.replace('_', '-')} is too small. Got: {value}. Allowed: 1 and more.")
    return asked


def unpacked(here: Path, work: Path) -> Path:
    """The kit's wheel, whole, as a folder that can be imported from; it is unpacked once."""
    try:
        kit = json.loads((here / "kit.json").read_text(encoding="utf-8"))
        name, stated = kit["wheel"], kit["files"][kit["wheel"]]["sha256"]
        found = hashlib.sha256((here / name).read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"The kit is damaged. Got: {type(error).__name__}: {error}. Copy it here again, and unpack it.") from None
    if found != stated:
        raise Refused(f"The kit is damaged. Got: '{name}' has other bytes than it had. Copy it here again, and unpack it.")
    folder = work / ("runtime-" + found[:12])
    if not folder.is_dir():
        partial = work / f".runtime-{os.getpid()}"
        try:
            shutil.rmtree(str(partial), ignore_errors=True)
            with zipfile.ZipFile(str(here / name)) as wheel:
                wheel.extractall(str(partial))
            partial.rename(folder)
        except OSError as error:
            shutil.rmtree(str(partial), ignore_errors=True)
            if not folder.is_dir():
                raise Refused(f"'{work}' cannot be written. Got: {error.strerror or error}. Name another place with --work.") from None
    return folder


def take_steps(here: Path, asked: argparse.Namespace) -> int:
    from edgediffusion.errors import EdgeDiffusionError
    from edgediffusion.runtimes.kit.steps import Asked, run

    bound = None if asked.workspace_mb is None else asked.workspace_mb * 1_000_000
    wanted = Asked(here, asked.work, asked.output, asked.step, asked.root, asked.runs, bound)
    progress = Progress()
    try:
        run(wanted, lambda text: progress.say(text), progress)
    except EdgeDiffusionError as error:
        progress.end()
        return say_error(str(error), FAILED)
    except OSError as error:
        progress.end()
        return say_error(f"'{error.filename}': {error.strerror or error}", FAILED)
    except Exception as error:
        progress.end()
        if os.environ.get("EDGEDIFFUSION_DEBUG", "") not in ("", "0"):
            raise
        return say_error(f"This is a bug. Got: {type(error).__name__}: {error}. EDGEDIFFUSION_DEBUG=1 shows where; please report it.", BUG)
    finally:
        progress.end()
    return 0


class Progress:
    """One line that rewrites itself on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.terminal, self.shown, self.open = sys.stderr.isatty(), 0.0, False

    def __call__(self, label: str, part: float) -> None:
        now = time.monotonic()
        if now - self.shown < (0.1 if self.terminal else 5.0):
            return
        self.shown, self.open = now, self.terminal
        sys.stderr.write(f"\r\x1b[K{part:4.0%}  {label}" if self.terminal else f"{part:4.0%}  {label}\n")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        self.end()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def end(self) -> None:
        if self.open:
            sys.stderr.write("\r\x1b[K")
            self.open = False


def say_error(text: str, code: int) -> int:
    sys.stderr.write(("" if code == CANCELLED else "Error: ") + text + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
