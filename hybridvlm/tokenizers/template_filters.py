"""The filters of chat templates: Jinja's, with bounded arguments and results, on texts that keep their origin."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jinja2
from jinja2 import filters

from hybridvlm.tokenizers.template_limits import (
    ARGUMENT,
    Counted,
    TooMuch,
    admit,
    check_values,
    fill,
    iterate,
    small,
    weigh,
    written,
)
from hybridvlm.tokenizers.text import LIMIT, Text, bounded, concatenate, person, plain, trusted


def bounded_filter(function: Callable[..., Any], *, skip: int = 0, letters: int = LIMIT) -> Callable[..., Any]:
    """A filter with its arguments and its result bounded; `skip` arguments are Jinja's own, `letters` a text may have."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        value = args[skip] if len(args) > skip else None
        if isinstance(value, str) and len(value) > letters:
            raise TooMuch(f"a filter is given a text of {len(value)} characters; at most {letters}")
        if isinstance(value, Iterator | range | Counted):
            value = list(iterate(value))
        small(*args[skip + 1 :], *kwargs.values())
        check_values(value, value, *args[skip + 1 :], *kwargs.values())
        if len(args) > skip:
            args = (*args[:skip], Text(value) if type(value) is str else value, *args[skip + 1 :])
        return admit(function(*args, **kwargs))

    return run


def bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test with its arguments counted."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        check_values(*args)
        return function(*args)

    return run


def not_offered(name: str) -> Callable[..., Any]:
    """Instead of a filter of Jinja's that chat templates do without."""

    def run(*args: Any, **kwargs: Any) -> Any:
        raise jinja2.TemplateError(f"Jinja's filter {name!r} is not offered here")

    return run


def _round(value: Any, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common") -> Any:
    if abs(precision) > 300:
        raise TooMuch(f"round to {precision} positions")
    return filters.do_round(value, precision, method)


def _join(value: Iterable[Any], d: str = "", attribute: Any = None, *, get: Callable[[Any], Any]) -> Text:
    return written(d).join([written(item if attribute is None else get(item)) for item in value])


@jinja2.pass_environment
def joined_filter(environment: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> Text:
    get = filters.make_attrgetter(environment, attribute) if attribute is not None else lambda item: item
    return _join(value, d, attribute, get=get)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Text:
    fill("indent with a width", width)
    space = written(width) if isinstance(width, str) else trusted(" ") * width
    lines = concatenate((written(value), trusted("\n"))).splitlines()
    bounded(len(lines) * (1 + len(space)) + sum(map(len, lines)))
    rest = [line if not line and not blank else concatenate((space, line)) for line in lines[1:]]
    head = concatenate((space, lines[0])) if first else lines[0]
    return trusted("\n").join([head, *rest])


def _truncate(value: Any, length: int = 255, killwords: bool = False, end: str = "...", leeway: int = 5) -> Text:
    text, end = written(value), written(end)
    if len(text) <= length + leeway:
        return text
    short = text[: max(0, length - len(end))]
    return concatenate((short if killwords else short.rsplit(" ", 1)[0], end))


def _wordwrap(
    value: Any, width: int = 79, break_long_words: bool = True, wrapstring: str = "\n", break_on_hyphens: bool = True
) -> str:
    fill("wordwrap with a wrapstring", wrapstring)
    return filters.do_wordwrap(
        jinja2.Environment(), plain(written(value)), width, break_long_words, str(wrapstring), break_on_hyphens
    )


def _escape(value: Any) -> Text:
    text = written(value)
    for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ('"', "&#34;")):
        text = text.replace(old, new)
    return text


def _title(value: Any) -> Text:
    return written(value)._mapped(filters.do_title)


def _sum(value: Iterable[Any], start: Any = 0) -> Any:
    for item in value:
        if not isinstance(item, int | float):
            raise TypeError(f"sum takes numbers, got {type(item).__name__}")
        start = admit(start + item)
    return start


def _format(value: Any, *args: Any, **kwargs: Any) -> Text:
    weigh(kwargs or args)
    return written(value) % (kwargs or args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    own = separators if separators is not None else (", ", ": ")
    fill("tojson with an indent or separators", indent, *own)
    elements, depth = weigh(value)
    bounded(
        (elements + 1) * (depth * (indent or 0 if isinstance(indent, int | None) else len(indent)) + sum(map(len, own)))
    )
    return person(
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )


OWN: dict[str, Callable[..., Any]] = {
    "capitalize": lambda value: written(value).capitalize(),
    "center": lambda value, width=80: written(value).center(width),
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "indent": _indent,
    "lower": lambda value: written(value).lower(),
    "replace": lambda value, old, new, count=None: written(value).replace(
        written(old), written(new), -1 if count is None else count
    ),
    "round": _round,
    "safe": lambda value: value,
    "string": written,
    "sum": _sum,
    "title": _title,
    "tojson": _tojson,
    "trim": lambda value, chars=None: written(value).strip(chars),
    "truncate": _truncate,
    "upper": lambda value: written(value).upper(),
    "wordwrap": _wordwrap,
}
# The longest text of those that go through it word by word
LONGEST = {"title": ARGUMENT, "wordwrap": 1 << 11}
# Jinja's own that do nothing but choose and order: those that look at a value, and those that go through a text letter by letter
JINJA = {
    LIMIT: ("abs", "count", "d", "default", "first", "items", "last", "length", "reverse"),
    ARGUMENT: (
        *(
            "batch",
            "dictsort",
            "float",
            "groupby",
            "int",
            "list",
            "map",
            "max",
            "min",
            "reject",
            "rejectattr",
            "select",
            "selectattr",
        ),
        *("slice", "sort", "unique", "wordcount"),
    ),
}
