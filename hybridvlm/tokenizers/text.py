"""Text of which every character knows where it came from: a template, a person, or the position of a medium.

What people write must never become a control token of a model, whatever a chat template makes of it (trims, splits, replaces,
upper case, joins). So a prompt is made of `Text`, whose operations carry each character's origin along. Where an operation
cannot tell, the characters count as a person's: that can never make a control token.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

LIMIT = 1 << 24  # characters of one text
PIECES = 1 << 18  # that one is cut into
TRUSTED, PERSON = "t", "p"  # origins; that of medium number n is chr(_MEDIA + n)
_MEDIA = 0x100
_PLACE = "\ufffc"  # what stands for a medium; the same character in a person's text is only a character
_WIDTH = 1 << 16  # the widest field of a format
_SEARCH = 1 << 26  # comparisons of letters in one search from the end, which takes all of them
_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where splitlines cuts


class Text(str):
    """A string with the origin of its characters; `trusted`, `person` and `medium` make one.

    A plain string that meets one in an operation counts as a person's.
    """

    __slots__ = ("_origin",)
    _origin: str

    def __new__(cls, value: str = "", origin: str | None = None) -> Text:
        bounded(len(value))
        made = str.__new__(cls, value)
        made._origin = origin_of(value) if origin is None else origin
        return made

    def __str__(self) -> Text:
        return self

    # for `__new__`, which takes one argument more than that of str
    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return plain(self), self._origin

    # -- pieces ---------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Text:
        return Text(str.__getitem__(self, key), self._origin[key])

    def __iter__(self) -> Iterator[Text]:
        return map(Text, str.__iter__(self), self._origin)

    def _cut(self, pieces: Iterable[str]) -> list[Text]:
        """Substrings of this text in their order, as parts of it."""
        found, at = [], 0
        for piece in pieces:
            at = str.find(self, piece, at)
            found.append(self[at : at + len(piece)])
            at += len(piece)
        return found

    def _apart(self, pieces: Iterable[str], separator: int) -> list[Text]:
        found, at = [], 0
        for piece in pieces:
            found.append(self[at : at + len(piece)])
            at += len(piece) + separator
        return found

    # The stubs have list[str], which list[Text] is not: a caller might add a plain string. Here the pieces know their origin.
    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Text]:  # type: ignore[override]
        pieces = _few(str.split(self, sep, _limited(maxsplit)))
        return self._cut(pieces) if sep is None else self._apart(pieces, len(sep))

    # as `split`
    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Text]:  # type: ignore[override]
        _searched(self, sep)
        pieces = _few(str.rsplit(self, sep, _limited(maxsplit)))
        return self._cut(pieces) if sep is None else self._apart(pieces, len(sep))

    # as `split`
    def splitlines(self, keepends: bool = False) -> list[Text]:  # type: ignore[override]
        _pieces(sum(str.count(self, one) for one in _BREAKS))
        lines = self._apart(str.splitlines(self, True), 0)
        return lines if keepends else [line[: len(own)] for line, own in zip(lines, str.splitlines(self), strict=True)]

    def partition(self, sep: str) -> tuple[Text, Text, Text]:
        head, found, tail = self._apart(str.partition(self, sep), 0)
        return head, found, tail

    def rpartition(self, sep: str) -> tuple[Text, Text, Text]:
        _searched(self, sep)
        head, found, tail = self._apart(str.rpartition(self, sep), 0)
        return head, found, tail

    def rfind(self, sub: str, *ends: Any) -> int:
        _searched(self, sub)
        return str.rfind(self, sub, *ends)

    def rindex(self, sub: str, *ends: Any) -> int:
        _searched(self, sub)
        return str.rindex(self, sub, *ends)

    def lstrip(self, chars: str | None = None) -> Text:
        _searched(self, chars)
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Text:
        _searched(self, chars)
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> Text:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> Text:
        return self[len(prefix) :] if str.startswith(self, prefix) else self

    def removesuffix(self, suffix: str) -> Text:
        return self[: -len(suffix)] if suffix and str.endswith(self, suffix) else self

    # -- together -------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Text:
        return concatenate((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Text:
        return concatenate((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: Any) -> Text:
        if not isinstance(times, int):
            return NotImplemented
        bounded(len(self) * max(0, times))
        return Text(str.__mul__(self, times), self._origin * times)

    __rmul__ = __mul__

    def join(self, parts: Iterable[str]) -> Text:
        parts = list(parts)
        wrong = next((part for part in parts if not isinstance(part, str)), None)
        if wrong is not None:
            raise TypeError(f"join takes texts, got {type(wrong).__name__}")
        return concatenate(
            piece for number, part in enumerate(parts) for piece in ((self, part) if number else (part,))
        )

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Text:
        count = operator.index(count)
        found = len(self) + 1 if not old else str.count(self, old)
        found = _pieces(found if count < 0 else min(count, found))
        bounded(len(self) + found * (len(new) - len(old)))
        origin, fresh, at = [], origin_of(new), 0
        for number in range(found):
            stop = str.index(self, old, at) if old else number
            origin += [self._origin[at:stop], fresh]
            at = stop + len(old)
        return Text(str.replace(self, old, new, count), "".join([*origin, self._origin[at:]]))

    # -- one character at a time ----------------------------------------------------------------------------------

    def _mapped(self, change: Callable[[str], str]) -> Text:
        if not self.isascii():  # a letter may become three
            bounded(3 * len(self))
        made = change(plain(self))
        if len(made) == len(self):
            return Text(made, self._origin)
        if len(set(self._origin)) == 1:
            return Text(made, self._origin[0] * len(made))
        more = {letter: len(change(letter)) - 1 for letter in set(plain(self))}
        more = {letter: n for letter, n in more.items() if n}  # some letters become several
        runs = list(_runs(self._origin))
        _pieces(len(runs) * len(more))
        lengths = [
            stop - start + sum(n * str.count(self, letter, start, stop) for letter, n in more.items())
            for _, start, stop in runs
        ]
        if sum(lengths) != len(made):
            return Text(made, PERSON * len(made))
        return Text(made, "".join(one * n for (one, _, _), n in zip(runs, lengths, strict=True)))

    def lower(self) -> Text:
        return self._mapped(str.lower)

    def upper(self) -> Text:
        return self._mapped(str.upper)

    def title(self) -> Text:
        return self._mapped(str.title)

    def capitalize(self) -> Text:
        return self._mapped(str.capitalize)

    def casefold(self) -> Text:
        return self._mapped(str.casefold)

    def swapcase(self) -> Text:
        return self._mapped(str.swapcase)

    # -- widths and formats ---------------------------------------------------------------------------------------

    def pad_to(self, before: int, after: int, fill: str) -> Text:
        if len(fill) != 1:
            raise TypeError("the fill character must be exactly one character long")
        fill = Text(fill)
        return concatenate((fill * before, self, fill * after))

    def ljust(self, width: SupportsIndex, fillchar: str = " ") -> Text:
        return self.pad_to(0, max(0, operator.index(width) - len(self)), fillchar)

    def rjust(self, width: SupportsIndex, fillchar: str = " ") -> Text:
        return self.pad_to(max(0, operator.index(width) - len(self)), 0, fillchar)

    def center(self, width: SupportsIndex, fillchar: str = " ") -> Text:
        width = operator.index(width)
        spare = max(0, width - len(self))
        left = spare // 2 + (spare & width & 1)
        return self.pad_to(left, spare - left, fillchar)

    def zfill(self, width: SupportsIndex) -> Text:
        width = operator.index(width)
        bounded(width)
        made = str.zfill(self, width)
        return Text(made, PERSON * (len(made) - len(self)) + self._origin) if self[:1] not in ("+", "-") else Text(made)

    def __mod__(self, values: Any) -> Text:
        rest = iter(values if isinstance(values, tuple) else (values,))
        pieces: list[str] = []
        # what fields write counts even where they cut it short: writing it out takes the time
        at, made = 0, len(self)
        while (start := str.find(self, "%", at)) >= 0:
            field = _PRINTF.match(self, start)
            if field is None:
                raise ValueError(f"unsupported format {plain(self)[start : start + 20]!r}")
            pieces.append(self[at:start])
            at = field.end()
            _pieces(len(pieces))
            if field["kind"] is None:  # two percent signs
                pieces.append(self[at - 1 : at])
                continue
            key, form = field["key"], plain(self[start:at])
            for width in (field["width"], field["precision"]):
                if width and (width == "*" or int(width) > _WIDTH):
                    raise ValueError(f"a field of width {width} in a format; at most {_WIDTH}")
            if key is None:
                try:
                    value = next(rest)
                except StopIteration:
                    raise TypeError("not enough arguments for format string") from None
            elif isinstance(values, Mapping):
                value, form = values[key], form.replace(f"({key})", "", 1)
            else:
                raise TypeError("format requires a mapping")
            if field["kind"] in _WRITTEN:
                value, form = _WRITTEN[field["kind"]](value), f"{form[:-1]}s"
                made = bounded(made + len(value))
            piece = value if form == "%s" else str.__mod__(form, (value,))
            made = bounded(made + len(piece))
            pieces.append(piece)
        pieces.append(self[at:])
        if not isinstance(values, Mapping) and next(rest, rest) is not rest:
            raise TypeError("not all arguments converted during string formatting")
        return concatenate(pieces)


# No part of it gives back what it took, so that a field costs its own length
_PRINTF = re.compile(
    r"%%|%(?:\((?P<key>[^)]*+)\))?+[#0\- +]*+(?P<width>\*|\d{1,9}+)?+"
    r"(?:\.(?P<precision>\*|\d{0,9}+))?+[hlL]?+(?P<kind>[diouxXeEfFgGcrsa])"
)
_WRITTEN: dict[str, Callable[[Any], str]] = {
    "s": lambda value: value if isinstance(value, str) else str(value),
    "r": repr,
    "a": ascii,
}
_RUN = re.compile(r"(.)\1*+", re.DOTALL)
_MEDIA_PLACES = re.compile(f"[^\0-{chr(_MEDIA - 1)}]")


def _runs(origin: str) -> Iterator[tuple[str, int, int]]:
    """(origin, start, stop) of every run of one origin."""
    return ((run[1], run.start(), run.end()) for run in _RUN.finditer(origin))


def _searched(text: str, what: str | None) -> None:
    if what is not None and len(text) * len(what) > _SEARCH and len(what) > 64:
        raise ValueError(f"a search for {len(what)} characters in {len(text)}")


def bounded(length: int) -> int:
    """A length, if a text may be that long; ValueError if not."""
    if length > LIMIT:
        raise ValueError(f"a text of {length} characters; at most {LIMIT}")
    return length


def _pieces(count: int) -> int:
    if count > PIECES:
        raise ValueError(f"a text of {count} pieces; at most {PIECES}")
    return count


def _limited(count: SupportsIndex) -> int:
    """A number of cuts, at most what may be made."""
    wanted = operator.index(count)
    return wanted if 0 <= wanted < PIECES else PIECES


def _few(pieces: list[str]) -> list[str]:
    _pieces(len(pieces))
    return pieces


def plain(text: str) -> str:
    """The same characters as an ordinary string."""
    return "".join((text,)) if type(text) is str else str.__getitem__(text, slice(None)) + ""


def origin_of(text: str) -> str:
    """One origin a character; a plain string is a person's."""
    return text._origin if isinstance(text, Text) else PERSON * len(text)


def concatenate(parts: Iterable[str]) -> Text:
    """Texts one after the other."""
    parts = list(parts)
    bounded(sum(map(len, parts)))
    return Text("".join(parts), "".join(map(origin_of, parts)))


def trusted(text: str) -> Text:
    """Text of a template or of this library: control tokens in it are meant."""
    return Text(text, TRUSTED * len(text))


def person(text: str) -> Text:
    """Text that somebody wrote: nothing in it is a control token."""
    return Text(text, PERSON * len(text))


def medium(number: int) -> Text:
    """The position of a medium."""
    return Text(_PLACE, chr(_MEDIA + number))


def media_in(text: str) -> list[int]:
    """The numbers of the media whose positions a text holds, in order."""
    return [ord(one) - _MEDIA for one in _MEDIA_PLACES.findall(origin_of(text))]


def cut_at_media(text: str) -> list[Text | int]:
    """A text in pieces: the text between media, none of it empty, and the number of each medium."""
    text = Text(text)
    parts: list[Text | int] = []
    at = 0
    for found in _MEDIA_PLACES.finditer(text._origin):
        parts += [text[at : found.start()], ord(found[0]) - _MEDIA]
        at = found.end()
    parts.append(text[at:])
    return [part for part in parts if part != ""]


def check_tokenizer(model: Any) -> None:
    """ValueError for a model that can neither read nor write text."""
    if model.tokenizer is None:
        raise ValueError(
            f"{model.name or 'the model'} has no tokenizer.json: text can be neither read nor written; put the checkpoint's "
            "tokenizer.json next to its weights, or give ids to prefill and decode"
        )
