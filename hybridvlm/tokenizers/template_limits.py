"""What a chat template may take: the limits of one rendering, and the checks of every value that it makes."""

from __future__ import annotations

import contextvars
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.sandbox import SecurityError
from jinja2.utils import Namespace

from hybridvlm.tokenizers.text import LIMIT, Text

SOURCE = 1 << 17  # characters of a template
SECONDS = 2.0  # of processor time, of this thread alone
STEPS = 1 << 20  # passes of loops, calls, operators
CHARACTERS = 1 << 26  # of all texts that are made
ELEMENTS, DEPTH = 1 << 17, 64  # of a list or mapping with all that it holds, and how deep it goes
BITS = 4096  # of a whole number
ARGUMENT = 1 << 16  # a number that a filter or a text's method is given
FILL = 64  # characters of an indent, a separator of JSON and the like, which are written again and again


class TooMuch(ValueError):
    """A template takes more than a chat template needs."""


class Budget:
    """What one rendering may still take."""

    def __init__(self) -> None:
        self.steps, self.characters, self.end = STEPS, CHARACTERS, time.thread_time() + SECONDS
        self.unchecked = 0

    def spend(self, steps: int = 1, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEPS} steps")
        if self.characters < 0:
            raise TooMuch(f"it writes more than {CHARACTERS} characters")
        self.unchecked += steps + characters // 64
        if self.unchecked >= 64:
            self.unchecked = 0
            if time.thread_time() > self.end:
                raise TooMuch(f"it takes more than {SECONDS:g} seconds")


budget: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


def admit(value: Any) -> Any:
    """A value that an operation made, if it is not too large; plain strings become a person's text, iterators lists."""
    if isinstance(value, str):
        budget.get().spend(characters=len(value))
        return value if isinstance(value, Text) else Text(value)
    if isinstance(value, int):
        if value.bit_length() > BITS:
            raise TooMuch(f"it makes a number of {value.bit_length()} bits; at most {BITS}")
    elif isinstance(value, list | tuple | dict | range | Namespace):
        weigh(value)
    elif isinstance(value, Iterator):
        return admit(list(iterate(value)))
    return value


def weigh(value: Any) -> tuple[int, int]:
    """Refuse what is too large or too deep when it is written out: a list that holds one list twice counts it twice.

    Returns:
        How many elements it has, and how deep it is.
    """
    elements, letters, deepest, stack = 0, 0, 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(item, str):
            letters += len(item)
        elif isinstance(item, int):
            letters += 1 + item.bit_length() // 3
        elif isinstance(item, range):
            elements += len(item)
        elif isinstance(item, list | tuple | dict | Namespace):
            held = item._Namespace__attrs if isinstance(item, Namespace) else item
            elements += len(held)
            if elements <= ELEMENTS:
                inside = itertools.chain.from_iterable(held.items()) if isinstance(held, dict) else held
                stack += [(inner, depth + 1) for inner in inside]
        if elements > ELEMENTS or letters > LIMIT or depth > DEPTH:
            raise TooMuch(
                f"it makes a list or mapping of more than {ELEMENTS} elements, {LIMIT} characters or {DEPTH} levels"
            )
    budget.get().spend(1 + elements // 4)
    return elements, deepest


def check_values(*values: Any) -> None:
    """Count what is read and not made: a comparison, a search, an argument."""
    sizes = [len(value) for value in values if isinstance(value, str | list | tuple | dict)]
    budget.get().spend(1 + sum(sizes) // 256)


def fill(what: str, *values: Any) -> None:
    """Refuse an indent, a separator or the like that is longer than such things are."""
    for value in values:
        if isinstance(value, str) and len(value) > FILL:
            raise TooMuch(f"{what} of {len(value)} characters; at most {FILL}")
        if isinstance(value, int) and value > FILL:
            raise TooMuch(f"{what} of {str(value)[:20]}; at most {FILL}")


def iterate(values: Iterable[Any]) -> Iterator[Any]:
    spend = budget.get().spend
    for value in values:
        spend()
        yield Text(value) if type(value) is str else value


class Counted:
    """What a loop goes over, each pass of which is counted."""

    def __init__(self, values: Any):
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iterate(self.values)

    def __len__(self) -> int:  # TypeError where the values have none, and Jinja then counts them itself
        return len(self.values)


def small(*values: Any) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > ARGUMENT:
            raise TooMuch(f"a filter or method is given {str(value)[:20]}; at most {ARGUMENT}")


def written(value: Any) -> Text:
    """A value as output has it."""
    if isinstance(value, str):
        return value if isinstance(value, Text) else Text(value)
    if isinstance(value, Namespace):
        raise SecurityError("a namespace cannot be written")
    if isinstance(value, list | tuple | dict | range):
        weigh(value)
    return admit(str(value))
