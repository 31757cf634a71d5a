"""The letter that a reply to a multiple-choice question stands for, by fixed steps and without a guess.

`letter` is the parser that scores; those of the harnesses, for comparison, are in `parity`. Both give a `Parsed`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from hybridvlm.inference.thinking import split_reply

VERSION = "letter-1"
_QUOTES = "\"'`\u201c\u201d\u2018\u2019 "
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Parsed(NamedTuple):
    """The letter of a reply, or None, and the step that gave it, or the reason that there is none."""

    letter: str | None
    how: str


def same_text(text: str) -> str:
    """A text for comparison: case, spaces, quotes around it and one full stop at its end make no difference."""
    text = " ".join(text.split()).strip(_QUOTES)
    return text.removesuffix(".").strip(_QUOTES).casefold()


_BOXED = re.compile(r"\\boxed\{\s*(?:\\text(?:bf)?\{)?\s*([^{}]*?)\s*\}")
# a letter that a reply begins with: alone, or with a bracket, full stop or colon and then perhaps some text
_FIRST = re.compile(r"^(?:([A-Za-z])|\(([A-Za-z])\)|\(?([A-Za-z])[).:]+|\(([A-Za-z]))(?:\s+(.*)|\s*)$", re.DOTALL)
_NAMED = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*\(?([A-Z])\b(?!['\u2019])")
_LONE = re.compile(r"(?<![\w'\u2019])([A-Z])(?![\w'\u2019])")
_WORD_AFTER = re.compile(r"\s+([a-z]+)")
_REASONS = ("because", "since", "as")


def letter(reply: str, options: Sequence[str]) -> Parsed:
    """The letter of the option that a reply names.

    Args:
        reply: what the model said.
        options: texts of the options, without letters.

    Returns:
        The letter, limited to those of the options, and the step that found it: "text" (the reply is an option's text),
        "first" (it begins with a letter), "named" (after "the answer is"), "lone" (the only letter in it). None with one of
        the reasons "empty", "several", "no such letter", "thinking not closed", "letter and text disagree", "none".
    """
    parts = split_reply(reply)
    if parts.unfinished:
        return Parsed(None, "thinking not closed")
    text = parts.text
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    text = re.sub(r"[*`]", "", text).strip()
    if not text:
        return Parsed(None, "empty")
    bare = [same_text(option) for option in options]
    whole = same_text(text)
    if len(whole) > 1 and whole in bare:
        return Parsed(ALPHABET[bare.index(whole)], "text")
    known = ALPHABET[: len(options)]
    return _first(text, known, bare) or _named(text, known) or _lone(text, known)


def _first(text: str, known: str, bare: Sequence[str]) -> Parsed | None:
    line = text.splitlines()[0].strip()
    match = _FIRST.match(line)
    if match is None or (match.group(1) and match.group(5)):  # a bare letter before words is a word: "A man"
        return None
    found = next(group for group in match.groups()[:4] if group).upper()
    if found not in known:
        return Parsed(None, "no such letter")
    rest = same_text(match.group(5) or "")
    if rest in bare and rest != bare[known.index(found)]:
        return Parsed(None, "letter and text disagree")
    return Parsed(found, "first")


def _is_word(text: str, found: str, end: int) -> bool:
    """Whether A or I before a lower-case word is an article or a pronoun."""
    after = _WORD_AFTER.match(text, end)
    return found in "AI" and after is not None and after.group(1) not in _REASONS


def _named(text: str, known: str) -> Parsed | None:
    hits = [m for m in _NAMED.finditer(text) if not _is_word(text, m.group(1), m.end())]
    if not hits:
        return None
    found = hits[-1].group(1)
    return Parsed(found, "named") if found in known else Parsed(None, "no such letter")


def _lone(text: str, known: str) -> Parsed:
    found = {m.group(1) for m in _LONE.finditer(text) if not _is_word(text, m.group(1), m.end())} & set(known)
    if len(found) == 1:
        return Parsed(found.pop(), "lone")
    return Parsed(None, "several" if found else "none")
