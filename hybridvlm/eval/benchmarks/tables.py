"""Rows of JSON, JSONL, parquet, CSV and TSV files, and their fields, with errors that name file, row and field."""

from __future__ import annotations

import ast
import codecs
import csv
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks.letters import ALPHABET
from hybridvlm.options import InputError

Row = Mapping[str, Any]
_CELL = 1 << 24  # characters of one cell
_LFS = b"version https://git-lfs"  # how a Git LFS pointer begins


def stub(path: pathlib.Path) -> str:
    """What a file is that only stands for another one, or holds nothing yet; "" for any other."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        return f"cannot be opened: {error}"
    if not head:
        return "is empty; is the download complete?"
    return "is a Git LFS pointer; run `git lfs pull` in its folder" if head == _LFS else ""


def read_json(path: pathlib.Path) -> Any:
    """A JSON file; InputError for one that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {stub(path) or f'not JSON: {error}'}") from None


def rows(path: pathlib.Path) -> list[Row]:
    """The rows of a table by its ending, values as the file has them (texts in CSV and TSV); InputError where it has none."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            found = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix in (".csv", ".tsv"):
            csv.field_size_limit(_CELL)
            with open(path, encoding="utf-8-sig", newline="") as file:
                found = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        elif path.suffix == ".jsonl":
            # lines end at line feeds alone: texts may hold U+2028 and other separators as they are
            lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
            found = [json.loads(line) for line in lines if line.strip()]
        else:
            found = read_json(path)
    except InputError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise InputError(f"{path}: {stub(path) or f'cannot be read as {path.suffix[1:]}: {error}'}") from None
    if not isinstance(found, list) or not all(isinstance(row, Mapping) for row in found):
        raise InputError(f"{path}: must hold a list of objects, one a question")
    return found


def mapping(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file that holds an object; InputError for any other."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: must hold an object, got {type(found).__name__}")
    return found


class Fields:
    """The fields of one row; InputError with file, row and field for one that is missing or wrong."""

    def __init__(self, row: Row, path: pathlib.Path, number: int):
        self.row, self.where = row, f"{path}, row {number + 1}"
        if not isinstance(row, Mapping):
            raise InputError(f"{self.where}: must be an object, got {row!r:.60}")

    def __contains__(self, name: str) -> bool:
        return self.row.get(name) is not None

    def value(self, name: str) -> Any:
        """A field that has to be there."""
        if self.row.get(name) is None:
            raise InputError(f"{self.where}: field {name!r} is missing; the row has {', '.join(map(str, self.row))}")
        return self.row[name]

    def text(self, name: str, default: str | None = None) -> str:
        """A text; a whole number is written without a point."""
        value = self.row.get(name)
        if value is None and default is not None:
            return default
        value = self.value(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return str(value)

    def number(self, name: str) -> float | None:
        """A number, None where there is none."""
        value = self.row.get(name)
        if value in (None, ""):
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(f"{self.where}: field {name!r} must be a number, got {value!r}") from None

    def texts(self, name: str) -> list[str]:
        """A list of texts, as a list or written as Python or JSON writes one."""
        value = self.value(name)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                raise InputError(f"{self.where}: field {name!r} must be a list, got {value!r:.60}") from None
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise InputError(f"{self.where}: field {name!r} must be a list, got {value!r:.60}")
        return [str(item) for item in value]

    def items(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self.value(name)
        if not isinstance(value, list):
            raise InputError(f"{self.where}: field {name!r} must be a list, got {value!r:.60}")
        return value

    def place(self, name: str, count: int) -> str | None:
        """The letter of an option that is given by its place, from 0; None where there is none, or it is negative."""
        number = self.number(name)
        if number is None or number < 0:
            return None
        if not number.is_integer() or number >= count:
            raise InputError(f"{self.where}: field {name!r} must be a place among {count} options, got {number:g}")
        return ALPHABET[int(number)]

    def letter(self, name: str, count: int) -> str | None:
        """A letter among the first `count`; None for any other text."""
        value = self.text(name).strip().upper()
        return value if len(value) == 1 and value in ALPHABET[:count] else None

    def lettered(self, name: str, count: int) -> tuple[str | None, str]:
        """(letter, remark) of an answer that has to be there and is given by its letter.

        Args:
            name: of the field.
            count: of options.

        Returns:
            The letter, None for a text that is none of an option, which is then remarked.
        """
        letter = self.letter(name, count)
        return letter, "" if letter else f"its answer {self.text(name)!r} is no option; it counts as wrong"

    def choices(self, name: str, options: Sequence[str]) -> tuple[str, ...]:
        """The options that were found in a field; InputError where there is nothing to choose between, or no letter for each."""
        if not 2 <= len(options) <= len(ALPHABET):
            raise InputError(
                f"{self.where}: field {name!r} must hold 2 to {len(ALPHABET)} options, {len(options)} found in "
                f"{self.row.get(name)!r:.60}"
            )
        return tuple(options)


def without_letters(options: Sequence[str]) -> list[str]:
    """Options without "A. ", "(B) " or "C) " before them, only if all of them begin with their own letter."""
    matches = [re.match(rf"\s*\(?{ALPHABET[i]}[.):]\s*", option) for i, option in enumerate(options)]
    if not all(matches):
        return list(options)
    return [option[match.end() :] for option, match in zip(options, matches, strict=True) if match]


def split_options(text: str, form: str) -> tuple[str, list[str]]:
    """(question, options) of a question that holds its options at its end, a line each.

    Args:
        text: the question.
        form: "(A)" or "A.", how the lines begin.

    Returns:
        The text before the last run of lines A, B, C, …, and their texts; no options where there is none.
    """
    begin = "({})" if form == "(A)" else "{}."
    lines = text.rstrip("\n").split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(begin.format("A"))]
    for start in reversed(starts):
        options: list[str] = []
        for line in lines[start:]:
            head = begin.format(ALPHABET[len(options)])
            if line.startswith(head):
                options.append(line[len(head) :].strip())
            elif options:
                options[-1] += "\n" + line
        if len(options) > 1:
            return "\n".join(lines[:start]).rstrip("\n"), options
    return text, []


def letter_of(answer: str, options: Sequence[str], last: bool = False) -> tuple[str | None, str]:
    """(letter, remark) of an answer that is written out.

    Args:
        answer: text of the right option.
        options: all of them.
        last: of equal options the last one, as some official scorers have it.

    Returns:
        The letter, None if no option is equal even without outer spaces and a full stop; what to remark of it, "" if nothing.
    """
    exact = [i for i, option in enumerate(options) if option == answer]
    loose = [i for i, option in enumerate(options) if option.strip().rstrip(".") == answer.strip().rstrip(".")]
    if not loose:
        return None, f"its answer {answer!r} is none of its options; it counts as wrong"
    found = exact or loose
    remark = "" if exact else f"its answer {answer!r} is an option but for a blank or a full stop"
    return ALPHABET[found[-1 if last else 0]], remark


def digest(path: pathlib.Path) -> str:
    """sha256 of a file, the first 16 digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
