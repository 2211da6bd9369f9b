"""The one place where an exception becomes a line on stderr and an exit code.

0    done
1    it could not be done: a damaged bundle, a full disk, a missing library
2    the arguments cannot be used
70   a bug of ours
130  stopped by Ctrl-C or SIGTERM
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from edgediffusion.errors import ArgumentError, Cancelled, EdgeDiffusionError, MissingExtra

DEBUG = "EDGEDIFFUSION_DEBUG"
EXTRAS = {"modelopt": "optimize", "openvino": "openvino", "tensorrt": "tensorrt", "tensorrt_rtx": "rtx", "cuda": "rtx"}
EXTRAS |= dict.fromkeys(("onnxruntime", "tokenizers", "PIL"), "cpu")
EXTRAS |= dict.fromkeys(("torch", "diffusers", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript"), "export")
FAILED, BAD_ARGUMENTS, BUG, CANCELLED = 1, 2, 70, 130


def exit_code(call: Callable[[], Any]) -> int:
    """Run a click command that was told not to end the process; the exit code that its ending means."""
    try:
        with _terminable():
            code = call()
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.Abort as stopped:
        if isinstance(stopped.__cause__, EOFError):  # click takes any end of file for a closed terminal
            return _explain(stopped.__cause__)
        return _explain(KeyboardInterrupt())
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error)


def _explain(error: BaseException) -> int:
    if os.environ.get(DEBUG, "") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, (KeyboardInterrupt, Cancelled)):
        return _say("Cancelled; nothing was kept.", CANCELLED)
    if isinstance(error, ModuleNotFoundError) and (module := (error.name or "").split(".")[0]) in EXTRAS:
        error = MissingExtra(module, EXTRAS[module], "This command")
    if isinstance(error, EdgeDiffusionError):
        return _say(f"Error: {error}", BAD_ARGUMENTS if isinstance(error, ArgumentError) else FAILED)
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the reader is gone: what is left in the buffer has nowhere to go
        return FAILED
    if isinstance(error, OSError):
        return _say(f"Error: {_os_error(error)}", FAILED)
    if isinstance(error, MemoryError):
        return _say("Error: This machine has not enough free memory for that. Close other programs, or use a smaller size.", FAILED)
    what = str(error).splitlines()[0] if str(error) else "no message"
    hint = f"Set {DEBUG}=1 to see where it happened, and report it with what that prints."
    return _say(f"Error: This is a bug in edgediffusion. Got: {type(error).__name__}: {what}. {hint}", BUG)


def _os_error(error: OSError) -> str:
    where = f"'{error.filename}': " if error.filename else ""
    return f"{where}{error.strerror or error}. Nothing was written."


def _say(line: str, code: int) -> int:
    click.echo(line, err=True)
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what was begun is cleaned away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
