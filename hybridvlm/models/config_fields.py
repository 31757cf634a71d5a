"""Fields of a published config.json, read one by one: of the kind that they must be, within bounds, or with their default.

A checkpoint comes from strangers: a field of another kind, or a size that nothing has, is refused by its name before anything is
built from it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.config import MOST_ROWS as MOST_ROWS
from hybridvlm.plain import shown as shown

# the largest of anything that is counted: far beyond every model, and small enough that nothing breaks before the
# checkpoint's own shapes are compared with it
MOST, MOST_LAYERS = 1 << 20, 4096
_FLOATS = ("Infinity", "-Infinity", "NaN")


def section(raw: Mapping[str, Any], *names: str) -> dict[str, Any] | None:
    """The first of these tables of a config.json that is there and not null. ValueError if it is no table."""
    for name in names:
        if raw.get(name) is not None:
            if not isinstance(raw[name], Mapping):
                raise ValueError(f"config.json: {name} must be a table, got {shown(raw[name])}")
            return dict(raw[name])
    return None


# what a model as a whole may say of its text: generation looks for it outside, too
OF_ALL = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def split_nested(
    inner: Mapping[str, Any], outer: Mapping[str, Any], together: Sequence[Sequence[str]] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a table nested in `outer` leaves to it, what of `outer` nobody reads).

    A field that the nested table leaves out has its class's default, whatever stands outside, as transformers builds the one class
    from the one table; a field that is null inside, and those of `OF_ALL`, are looked for outside. together: names that speak of
    one thing: null under one of them, and not given under any other, is null under each.
    """
    groups = {name: group for group in together for name in group}
    seen: dict[str, Any] = {}
    unread: dict[str, Any] = {}
    for name, value in outer.items():
        group = groups.get(name, (name,))
        null = any(other in inner for other in group) and all(inner.get(other) is None for other in group)
        (seen if null or name in OF_ALL or (name in inner and inner[name] is None) else unread)[name] = value
    return seen, unread


class Fields:
    """The fields of one configuration class: in the first of `tables` (label -> table) that has them, and not as null.

    A null hides no field of a table further out, and where there is none it counts as left out. defaults: of fields that are
    left out. aliases: other names of a field. unread: what stands where transformers does not look; a warning says so where a
    field is found there alone. file: for messages. Every getter raises a ValueError that names the field and what it must be.
    """

    def __init__(
        self,
        tables: Mapping[str, Mapping[str, Any]],
        defaults: Mapping[str, Any],
        aliases: Mapping[str, Sequence[str]] | None = None,
        unread: Mapping[str, Any] | None = None,
        file: str = "config.json",
    ):
        self.tables, self.defaults, self.aliases = tables, defaults, aliases or {}
        self.unread, self.file = unread or {}, file

    def find(self, name: str) -> tuple[str, Any] | None:
        """(label and key, value) of a field that is given, else None."""
        for label, table in self.tables.items():
            for key in (*self.aliases.get(name, ()), name):
                if table.get(key) is not None:
                    return f"{label}{key}", table[key]
        for key in (*self.aliases.get(name, ()), name):
            value = self.unread.get(key)
            if value is not None and value != self.defaults.get(name):
                usual = f"takes {shown(self.defaults[name])}" if name in self.defaults else "does without"
                warnings.warn(
                    f"{self.file}: {key} {shown(value)} stands outside {next(iter(self.tables)).rstrip('.')}, where it is "
                    f"not read: transformers {usual}, and so does this library. Move it inside if it is meant",
                    stacklevel=2,
                )
        return None

    def null(self, name: str) -> bool:
        """Whether a field is given, as null alone."""
        return self.find(name) is None and any(name in table for table in self.tables.values())

    def get(self, name: str) -> tuple[str, Any]:
        """(label and key, value or default)."""
        found = self.find(name)
        if found is not None:
            return found
        if name not in self.defaults:
            raise ValueError(f"{self.file} has no {name!r}, which this family needs")
        return name, self.defaults[name]

    def count(self, name: str, least: int = 1, most: int = MOST) -> int:
        """A whole number from `least` to `most`."""
        label, value = self.get(name)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{self.file}: {label} must be a whole number from {least} to {most}, got {shown(value)}")
        return value

    def side(self, name: str) -> int:
        """A count that may be written once for each axis."""
        label, value = self.get(name)
        if isinstance(value, (list, tuple)) and value and all(x == value[0] for x in value):
            value = value[0]
        return Fields({label.removesuffix(name): {name: value}}, {}, file=self.file).count(name)

    def number(self, name: str, least: float = 0.0, most: float = 1e30, *, above: bool = False) -> float:
        """A finite number from `least` (`above` it, if that is asked) to `most`."""
        label, value = self.get(name)
        number = _float(value)
        if number is None or not least <= number <= most or (above and number == least):
            what = f"above {least:g}" if above else f"from {least:g}"
            raise ValueError(f"{self.file}: {label} must be a number {what} up to {most:g}, got {shown(value)}")
        return number

    def flag(self, name: str) -> bool:
        """true or false."""
        label, value = self.get(name)
        if not isinstance(value, bool):
            raise ValueError(f"{self.file}: {label} must be true or false, got {shown(value)}")
        return value

    def any_flag(self, name: str) -> bool:
        """Whether any table says true."""
        said = [
            Fields({label: table}, {name: False}, file=self.file).flag(name) for label, table in self.tables.items()
        ]
        return any(said)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field that means another computation than the one there is."""
        label, value = self.get(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"{self.file}: {label} = {shown(value)} is not supported; supported: {list(allowed)}")

    def counts(self, name: str, least: int = 0, most: int = MOST, length: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers."""
        label, value = self.get(name)
        listed = isinstance(value, (list, tuple)) and len(value) <= MOST_LAYERS and len(value) in (length, len(value))
        if not listed or (length is not None and len(value) != length) or not all(type(x) is int for x in value):
            what = "whole numbers" if length is None else f"{length} whole numbers"
            raise ValueError(f"{self.file}: {label} must be a list of {what}, got {shown(value)}")
        if not all(least <= x <= most for x in value):
            raise ValueError(f"{self.file}: {label} must hold numbers from {least} to {most}, got {shown(value)}")
        return tuple(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers, of which infinity is one."""
        label, value = self.get(name)
        found = [_float(x) for x in value] if isinstance(value, (list, tuple)) and len(value) == length else [None]
        numbers = tuple(x for x in found if x is not None and not math.isnan(x))
        if len(numbers) != len(found):
            raise ValueError(f"{self.file}: {label} must be a list of {length} numbers, got {shown(value)}")
        return numbers

    def three(self, name: str) -> tuple[float, float, float]:
        """A list of three numbers."""
        first, second, third = self.numbers(name, 3)
        return first, second, third

    def word(self, name: str) -> str:
        """A word."""
        label, value = self.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{self.file}: {label} must be a word, got {shown(value)}")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """One token id, several, or none."""
        if self.null(name):
            return ()
        label, value = self.get(name) if name in self.defaults or self.find(name) else (name, None)
        return token_ids(f"{self.file}: {label}", value)

    def id(self, name: str) -> int | None:
        """A token id or none."""
        found = self.ids(name)
        return found[0] if found else None


def token_ids(label: str, value: Any) -> tuple[int, ...]:
    """Token ids of a field that holds one, a list of them, or null. ValueError that begins with `label`."""
    found = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(x) is int and 0 <= x < 1 << 31 for x in found):
        raise ValueError(f"{label} must be a token's id or a list of them, got {shown(value)}")
    return found


def _float(value: Any) -> float | None:
    """A number as JSON has it or as transformers writes it ({"__float__": "Infinity"}); None for anything else."""
    if isinstance(value, Mapping) and value.get("__float__") in _FLOATS:
        return float(value["__float__"])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return None if isinstance(value, int) and abs(value) >= 1 << 1000 else float(value)


def tied(reference: bool, said: bool, head: str, shapes: Mapping[str, Any] | None) -> bool:
    """Whether head and embedding are one. reference: by the field that transformers reads; said: by any that says so.

    Where the checkpoint holds a head, what transformers reads counts (and then the values: a head of its own is never
    dropped); where it holds none, the word of whoever saved it without.
    """
    if shapes is None or any(re.search(rf"(?:^|\.){re.escape(head)}$", name) for name in shapes):
        return reference
    return reference or said
