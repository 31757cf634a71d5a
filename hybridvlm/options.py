"""`KEY=VALUE` options of the commands, read into the config dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any

THINKING = {"auto": None, "on": True, "off": False}


class InputError(ValueError):
    """Something in the options or the input files that no run can start with."""


def add_thinking(parser: argparse.ArgumentParser) -> None:
    """The options of commands that ask a model: whether it reasons before it answers, and how long."""
    switch = "reasoning before an answer, by the chat template's switch (default: what the template does by itself)"
    budget = "most tokens of reasoning; then it is ended, and the answer has its own (default: one limit for both)"
    parser.add_argument("--thinking", default="auto", choices=tuple(THINKING), help=switch)
    parser.add_argument("--think-tokens", type=int, metavar="N", help=budget)


def split(text: str) -> list[str]:
    """The parts of a comma list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_pairs(tokens: Sequence[str], option: str) -> dict[str, list[str]]:
    """`key=value` pairs, split by spaces or commas; a part without "=" continues the list before it (frames=8,16)."""
    pairs: dict[str, list[str]] = {}
    key = None
    for part in (piece for token in tokens for piece in split(token)):
        if "=" in part:
            key, value = (p.strip() for p in part.split("=", 1))
            pairs[key] = [value]
        elif key is None:
            raise InputError(f"{option} takes key=value, got {part!r}")
        else:
            pairs[key].append(part)
    return pairs


def override(base: Any, tokens: Sequence[str], option: str) -> Any:
    """A config dataclass with some fields replaced by `key=value` texts; InputError for a wrong one, with the keys."""
    changes: dict[str, Any] = {}
    for key, values in parse_pairs(tokens, option).items():
        names = [f.name for f in dataclasses.fields(base)]
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"{option} has no key {key!r}; {hint}the keys are {', '.join(names)}")
        old = getattr(base, key)
        try:
            if isinstance(old, tuple):
                number = typing.get_args(typing.get_type_hints(type(base))[key])[0]
                changes[key] = tuple(number(value) for value in values)
                continue
            (value,) = values
            if isinstance(old, bool):
                changes[key] = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}[
                    value.lower()
                ]
            else:
                changes[key] = type(old)(value)
        except (KeyError, ValueError):
            kind = "on or off" if isinstance(old, bool) else "a number" if isinstance(old, (int, float)) else "numbers"
            raise InputError(f"{option} {key} must be {kind}, got {','.join(values)!r}") from None
    try:
        return dataclasses.replace(base, **changes)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from None
