"""`KEY=VALUE` options of the commands, read into the config dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from hybridvlm.config import DROP_TEXT

MODES = ("auto", "on", "off")
THINKING = {"auto": None, "on": True, "off": False}


class InputError(ValueError):
    """Something in the options or the input files that no run can start with."""


def add_thinking(parser: argparse.ArgumentParser) -> None:
    """The options of commands that ask a model: whether it reasons before it answers, and how long."""
    switch = "reasoning before an answer, by the chat template's switch (default: what the template does by itself)"
    budget = "most tokens of reasoning; then it is ended, and the answer has its own (default: one limit for both)"
    parser.add_argument("--thinking", default="auto", choices=tuple(THINKING), help=switch)
    parser.add_argument("--think-tokens", type=int, metavar="N", help=budget)


def add_drop_text(parser: argparse.ArgumentParser) -> None:
    """The option of commands that make plans: what happens to the text around frames that lose their tokens."""
    text = (
        "text of a frame's own (time stamp, separators) that goes at a drop: none, empty-frames (of frames without a visual token "
        "left), best-frames (of all but the best frames, as many as the tokens left would fill, so that text falls as tokens do)"
    )
    parser.add_argument("--drop-text", choices=DROP_TEXT, help=text + " (default: the checkpoint's own, or none)")


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """The option of commands that run a model: the devices it runs on."""
    text = (
        "devices along the axes of a mesh, such as data=4,tensor=2; one may be -1: the rest. data cuts batches, tensor "
        "heads and channels, sequence the rows of a prompt; all of them share a video's frames (default: auto, the "
        "smallest tensor x sequence that fits, the rest data; one device where their memory is not known, as on CPU)"
    )
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=text)


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """The option of commands that several processes can share."""
    several = (
        "work together with the other processes of this launch: auto where one is recognised (Slurm, Open MPI, a TPU slice, GKE, "
        "multislice, XPK, JAX's variables), on or fail, off (default: auto)"
    )
    parser.add_argument("--distributed", default="auto", choices=MODES, help=several)


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    """The option of commands that compile: where compiled programs are kept."""
    cache = "folder or gs://bucket/folder of compiled programs for the next start, or off (default: one in the user's cache folder)"
    parser.add_argument("--compilation-cache", default="", metavar="DIR", help=cache)


_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def byte_count(text: str, option: str) -> int:
    """Bytes of a text such as 500MB, 20GB, 4GiB or 1e9's digits; InputError naming the option for any other, and for none."""
    match = _BYTES.fullmatch(text.strip())
    power = "KMGT".find((match.group(2) or " ").upper()) + 1 if match else 0
    count = int(float(match.group(1)) * (1024 if match.group(3) else 1000) ** power) if match else 0
    if count < 1:
        raise InputError(f"{option} takes a size such as 500MB or 20GB, got {text!r}")
    return count


class FieldHelp(NamedTuple):
    """One field of a config: its dotted key, its type and default as texts, and its documentation."""

    key: str
    type: str
    default: str
    text: str


def field_help(config: Any, prefix: str = "") -> dict[str, list[FieldHelp]]:
    """The fields of a config dataclass and of those nested in it, by the dotted key of their group ("" for its own).

    Documentation is read from the `Attributes:` of the docstrings. A nested config whose default is None is one field.
    """
    docs, hints = attribute_docs(type(config)), typing.get_type_hints(type(config))
    groups: dict[str, list[FieldHelp]] = {prefix: []}
    for field in dataclasses.fields(config):
        key, value = f"{prefix}.{field.name}".lstrip("."), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            groups |= field_help(value, key)
        else:
            groups[prefix].append(FieldHelp(key, _type_name(hints[field.name]), _as_set(value), docs[field.name]))
    return groups


def attribute_docs(cls: type) -> dict[str, str]:
    """The entries under `Attributes:` of a class's docstring, each on one line."""
    _, _, section = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"list of {typing.get_args(kind)[0].__name__}"
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    return " or ".join(part.__name__ for part in parts) if parts else kind.__name__


def _as_set(value: Any) -> str:
    """A value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def split(text: str, option: str | None = None) -> list[str]:
    """The parts of a comma list; InputError where it has none and `option` is what it was given by."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if option is not None and not parts:
        raise InputError(f"{option} takes a comma list of at least one, got {text!r}")
    return parts


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
