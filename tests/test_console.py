"""What the commands print: progress where there is no terminal, and tables that fit one."""

import io
import itertools
import sys
import time

import pytest

from hybridvlm import console


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


ROWS = [
    {"method": "dense", "budget": "1", "accuracy %": "99.0 [98.0, 100.0]", "note": "[a] b"},
    {"method": "random-input", "budget": "0.25", "accuracy %": "8", "note": ""},
]
PLAIN = """\
method        budget  accuracy %          note
dense         1       99.0 [98.0, 100.0]  [a] b
random-input  0.25    8"""


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic as seconds that a test sets."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_every_ten_seconds_with_the_time_left(clock, capsys):
    with console.progress(40, "answer", "eval", done=10) as bar:
        assert isinstance(bar, console.LogProgress)
        bar.set_postfix_str("str 0.25")
        for second in range(1, 31):
            clock[0] = float(second)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "eval: 20/40 answers (str 0.25), 10 s so far, about 20 s left",
        "eval: 30/40 answers (str 0.25), 20 s so far, about 10 s left",
        "eval: 40/40 answers (str 0.25), 30 s so far, about 0 s left",
    ]


def test_what_is_quick_leaves_no_line(clock, capsys):
    assert list(console.track("abc", "letter")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_and_a_silent_process_nothing(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.progress(2, "answer") as bar:
        bar.update(2)
    assert "2/2" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", quiet := io.StringIO())
    with console.progress(2, "answer", shown=False) as bar:
        bar.update(2)
    assert quiet.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_a_file_gets_a_plain_table_in_one_piece(capsys):
    console.print_table(ROWS, style=lambda number, column: "bold red")
    assert capsys.readouterr().out == PLAIN + "\n"
    assert console.plain_table(ROWS, right=True).splitlines()[1] == "       dense       1  99.0 [98.0, 100.0]  [a] b"


@pytest.mark.parametrize("setting", ["colour", "NO_COLOR", "dumb"])
def test_a_terminal_has_colours_unless_it_is_told_not_to(monkeypatch, setting):
    monkeypatch.setenv("TERM", "dumb" if setting == "dumb" else "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if setting == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    console.print_table(ROWS, style=lambda number, column: "red", width=100)
    console.print_lines(["warning: a [b]"], "yellow")
    console.print_markdown("| a | b |\n|---|---|\n| 1 | 2 |")
    text = terminal.getvalue()
    assert ("\x1b[" in text) == (setting == "colour") and "99.0 [98.0, 100.0]" in text and "a [b]" in text


def test_a_narrow_terminal_gets_the_other_columns_below(monkeypatch):
    assert console.column_blocks(ROWS, 1, 200) == [["method", "budget", "accuracy %", "note"]]
    assert console.column_blocks(ROWS, 1, 42) == [["method", "budget", "accuracy %"], ["method", "note"]]
    # a column that is too wide by itself stands alone, and none is lost
    for width in range(1, 60):
        blocks = console.column_blocks(ROWS, 2, width)
        assert [b[:2] for b in blocks] == [["method", "budget"]] * len(blocks)
        assert list(itertools.chain(*(b[2:] for b in blocks))) == ["accuracy %", "note"]
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    console.print_table(ROWS, width=42)
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 42 and sum(line.startswith("random-input") for line in lines) == 2
