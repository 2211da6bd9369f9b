from __future__ import annotations

import io

from edgediffusion.cli._progress import Progress, line


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_lines_are_plain_and_seconds_apart() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock) as progress:
        for tenth in range(101):
            clock.now = tenth / 10
            progress("sampling", tenth / 100)
    lines = stream.getvalue().splitlines()
    assert [text.split("]")[1].split()[0] for text in lines] == ["0%", "50%", "100%"]
    assert "\r" not in stream.getvalue()


def test_a_terminal_has_one_line_that_is_ended_once() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock) as progress:
        for tenth in range(11):
            clock.now = float(tenth)
            progress("sampling", tenth / 10)
    text = stream.getvalue()
    assert text.count("\r\x1b[K") == 11
    assert text.count("\n") == 1
    assert text.endswith("\n")


def test_it_is_not_redrawn_more_often_than_eyes_can_see() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock) as progress:
        for thousandth in range(1000):
            clock.now = thousandth / 1000
            progress("sampling", thousandth / 1000)
    assert stream.getvalue().count("\r") <= 11


def test_less_done_than_before_is_another_piece_of_work_on_its_own_line() -> None:
    stream = Terminal()
    with Progress(stream, Clock()) as progress:
        progress("export", 1.0)
        progress("quantize", 0.0)
    first, second, _ = stream.getvalue().split("\n")
    assert first.endswith("export")
    assert second.endswith("quantize")


def test_the_end_of_an_error_is_the_end_of_the_line() -> None:
    stream = Terminal()
    try:
        with Progress(stream, Clock()) as progress:
            progress("export", 0.5)
            raise ValueError
    except ValueError:
        pass
    assert stream.getvalue().endswith("\n")


def test_nothing_is_written_where_nothing_was_said() -> None:
    stream = Terminal()
    with Progress(stream, Clock()):
        pass
    assert stream.getvalue() == ""


def test_a_line_tells_part_time_and_what_is_left() -> None:
    assert line("sampling", 0.25, 3.0) == "[#######---------------------]  25%  3 s, 9 s left  sampling"
    assert line("sampling", 0.0, 0.0) == "[----------------------------]   0%  0 s  sampling"
    assert line("sampling", 1.5, 3.0).startswith("[############################] 100%  3 s  ")
