"""Dataclasses from plain dicts, as JSON has them, and back: every key known, every value of its field's kind."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def from_dict(cls: type[ConfigT], data: dict[str, Any], *, kinds: bool = True) -> ConfigT:
    """Build the dataclass `cls` from a plain dict (as read from JSON); nested dataclasses are built too.

    Raises ValueError for a key that `cls` does not have, with the nearest name it has, for one that it needs and that is
    missing, and, unless `kinds` is False (for a class that looks at its own), for a value of another kind than the field's.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__} must be a table, got {shown(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {sorted(fields)}"
            raise ValueError(f"{cls.__name__} has no key {key!r}{hint}")
        values[key] = _of_kind(f"{cls.__name__}.{key}", _kinds(cls)[key], value) if kinds else _tuples(value)
    lacking = [f.name for f in fields.values() if f.name not in values and _needed(f)]
    if lacking:
        raise ValueError(f"{cls.__name__} needs {', '.join(map(repr, lacking))}")
    return cls(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _needed(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def shown(value: Any) -> str:
    """A value for a message: on one line, and not all of a long one."""
    if isinstance(value, (str, bytes, list, tuple)):
        # 60 of them fill the line already
        value = value[:60]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _of_kind(where: str, kind: Any, value: Any) -> Any:
    """A value as a field of this type has it: lists become tuples, tables dataclasses. ValueError for any other kind."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        left = [part for part in parts if part is not type(None)]
        return _of_kind(where, left[0], value) if len(left) == 1 else value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if dataclasses.is_dataclass(value) else from_dict(kind, value)
    if origin is tuple and isinstance(value, (list, tuple)):
        if parts[-1] is not Ellipsis and len(value) != len(parts):
            raise ValueError(f"{where} must have {len(parts)} values, got {shown(value)}")
        each = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_of_kind(where, part, v) for part, v in zip(each, value, strict=True))
    if kind is float and isinstance(value, str) and value in ("inf", "-inf"):  # as to_dict writes them
        return float(value)
    right = {
        bool: lambda: isinstance(value, bool),
        int: lambda: type(value) is int and abs(value) < 1 << 53,
        float: lambda: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300,
        str: lambda: isinstance(value, str),
        tuple: lambda: False,
    }.get(origin or kind, lambda: True)
    if not right():
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list"}
        raise ValueError(f"{where} must be {words[origin or kind]}, got {shown(value)}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dict of a config dataclass, ready for JSON (infinities become the strings that float() reads)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return repr(value) if isinstance(value, float) and math.isinf(value) else value

    return plain(dataclasses.asdict(config))
