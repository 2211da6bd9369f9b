"""Progress on stderr: one line that rewrites itself on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_WIDTH = 28
_TERMINAL_S, _PLAIN_S = 0.1, 5.0


class Progress:
    """Called by the library as ``progress(label, part)``: what it is doing, and which part of all is done, 0 to 1.

    A ``part`` smaller than the one before begins another piece of work, on a line of its own. A context manager:
    leaving it ends the line, so that whatever is printed next begins at the margin.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._stream = stream or sys.stderr
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._part: float | None = None
        self._begun = self._shown_at = 0.0
        self._line = ""

    def __call__(self, label: str, part: float = 0.0) -> None:
        now = self._clock()
        if self._part is None or part < self._part:
            self._end_line()
            self._begun = now
        elif part < 1 and now - self._shown_at < (_TERMINAL_S if self._terminal else _PLAIN_S):
            return
        self._part, self._shown_at = part, now
        self._show(line(label, part, now - self._begun))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_line()

    def _show(self, text: str) -> None:
        if text == self._line:
            return
        self._line = text
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()

    def _end_line(self) -> None:
        if self._terminal and self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._line, self._part = "", None


def line(label: str, part: float, seconds: float) -> str:
    """``[#######---------------------]  25%  3 s, 9 s left  sampling``"""
    part = min(max(part, 0.0), 1.0)
    bar = "#" * int(part * _WIDTH)
    left = f", {seconds / part - seconds:.0f} s left" if 0 < part < 1 and seconds >= 1 else ""
    return f"[{bar:-<{_WIDTH}}] {part:4.0%}  {seconds:.0f} s{left}  {label}"
