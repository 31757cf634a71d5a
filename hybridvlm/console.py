"""What the commands show while they run and at the end: progress on stderr, tables on stdout, both for terminals and for logs."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
# Seconds from one log line to the next where stderr is no terminal.
LOG_EVERY = 10.0
Style = Callable[[int, str], str]


# -- progress -------------------------------------------------------------------------------------------------------------


class Progress(Protocol):
    """A count on its way to a total."""

    def update(self, count: int = 1) -> Any:
        """Count on."""
        ...

    def set_postfix_str(self, text: str, refresh: bool = False) -> Any:
        """What is being done."""
        ...

    def __enter__(self) -> Progress: ...

    def __exit__(self, *error: Any) -> Any: ...


class LogProgress:
    """Progress as lines of a log: one every `every` seconds, with the part done and the time left."""

    def __init__(self, total: int, unit: str, what: str = "", done: int = 0, every: float = LOG_EVERY):
        self.total, self.unit, self.every = total, unit, every
        self._what, self._postfix, self._done = what, "", done
        self._start = self._last = time.monotonic()
        # Of the first update, from which the time left is told: what came before it was compilation.
        self._first: tuple[float, int] | None = None

    def update(self, count: int = 1) -> None:
        """Count on, and write a line if the last one is `every` seconds old or all is done."""
        self._done += count
        now = time.monotonic()
        self._first = self._first or (now - self._start, self._done)
        if now - self._last < self.every and (self._done < self.total or self._last == self._start):
            return
        self._last = now
        print(self.line(now - self._start), file=sys.stderr, flush=True)

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """What is being done, for the next line."""
        self._postfix = text

    def line(self, seconds: float) -> str:
        """The line after `seconds` of work."""
        since, count = self._first or (seconds, self._done)
        rate = (seconds - since) / max(1, self._done - count)
        left = f", about {duration(rate * (self.total - self._done))} left" if self._done > count else ""
        after = f" ({self._postfix})" if self._postfix else ""
        before = f"{self._what}: " if self._what else ""
        return f"{before}{self._done}/{self.total} {self.unit}s{after}, {duration(seconds)} so far{left}"

    def __enter__(self) -> LogProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def duration(seconds: float) -> str:
    """Seconds for people: "8 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def progress(
    total: int, unit: str, what: str = "", *, done: int = 0, shown: bool = True, delay: float = 0.0, leave: bool = True
) -> Progress:
    """Progress on stderr: a bar at a terminal, elsewhere a line every ten seconds.

    Args:
        total: what is counted to.
        unit: what is counted, in the singular.
        what: the work's name.
        done: what was done before this call.
        shown: False for processes that stay silent.
        delay: seconds before a bar appears.
        leave: whether a bar stays when it is full.
    """
    if shown and not sys.stderr.isatty():
        return LogProgress(total, unit, what, done)
    try:
        from tqdm import tqdm
    except ImportError:  # `bench device` runs where little is installed
        return LogProgress(total, unit, what, done, every=LOG_EVERY if shown else math.inf)
    return tqdm(
        total=total, initial=done, unit=unit, desc=what or None, disable=not shown, mininterval=0.5, delay=delay, leave=leave
    )  # fmt: skip


def track(items: Sequence[T], unit: str, what: str = "") -> Iterator[T]:
    """The items one after the other, with `progress`."""
    with progress(len(items), unit, what) as bar:
        for item in items:
            yield item
            bar.update()


# -- tables ---------------------------------------------------------------------------------------------------------------


def rich_terminal() -> bool:
    """Whether stdout is a terminal that takes colours: not with NO_COLOR or TERM=dumb."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_table(
    rows: Sequence[Mapping[str, str]],
    *,
    keys: int = 1,
    style: Style | None = None,
    right: bool = False,
    width: int | None = None,
) -> None:
    """Print rows as a table on stdout; columns that a terminal is too narrow for follow in a further table below.

    Where stdout is no terminal, or NO_COLOR is set, it is plain text; a file gets it in one piece, however wide.

    Args:
        rows: texts by column; all rows have the columns of the first.
        keys: how many columns name a row, and stand in every part of a table that is cut.
        style: (row number, column) -> a style of rich, "" for none.
        right: whether to align to the right.
        width: of the terminal, instead of the one there is.
    """
    from rich.console import Console

    if not rows:
        return
    if sys.stdout.isatty():
        console = Console(color_system="auto" if rich_terminal() else None, width=width, highlight=False)
        for number, columns in enumerate(column_blocks(rows, keys, console.width)):
            if number:
                console.print()
            console.print(_table(rows, columns, style, right, lines=True))
    else:
        print(plain_table(rows, right=right))


def plain_table(rows: Sequence[Mapping[str, str]], *, right: bool = False) -> str:
    """Rows as aligned text, with two spaces between columns."""
    from rich.console import Console

    columns = list(rows[0])
    console = Console(file=io.StringIO(), width=sum(_widths(rows, columns)) + 2 * len(columns), color_system=None)
    console.print(_table(rows, columns, None, right, lines=False))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def column_blocks(rows: Sequence[Mapping[str, str]], keys: int, width: int) -> list[list[str]]:
    """The columns in parts that fit into `width`; each part begins with the first `keys` columns."""
    columns = list(rows[0])
    wide = dict(zip(columns, _widths(rows, columns), strict=True))
    head, blocks, used = columns[:keys], [list[str]()], 0
    start = sum(wide[column] + 2 for column in head)
    for column in columns[keys:]:
        if blocks[-1] and start + used + wide[column] + 2 > width:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += wide[column] + 2
    return [head + block for block in blocks]


def _widths(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[int]:
    from rich.cells import cell_len

    return [max(cell_len(column), *(cell_len(row[column]) for row in rows)) for column in columns]


def _table(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str], style: Style | None, right: bool, lines: bool
) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD if lines else None,
        show_edge=False,
        pad_edge=False,
        # a box draws one more space between columns
        padding=(0, 1 if lines else 2, 0, 0),
        header_style="bold" if lines else "",
    )
    for column in columns:
        table.add_column(Text(column), justify="right" if right else "left", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*(Text(row[column], style=style(number, column) if style else "") for column in columns))
    return table


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table whose columns also line up as plain text; all rows have the columns of the first."""
    columns = list(rows[0]) if rows else []
    widths = [max(3, width) for width in _widths(rows, columns)]

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(columns), rule, *(line(row[column] for column in columns) for row in rows)])


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A share in percent for a cell of a table; "-" for None."""
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.{digits}f}"


def print_markdown(text: str) -> None:
    """Print a report: rendered at a terminal that takes colours, elsewhere as the Markdown that it is."""
    if not rich_terminal():
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console(highlight=False).print(Markdown(text))


def print_lines(lines: Iterable[str], style: str = "") -> None:
    """Print lines on stdout, in a style of rich where the terminal takes colours."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True) if style and rich_terminal() else None
    for line in lines:
        if console is None:
            print(line)
        else:
            console.print(line, style=style, markup=False)
