"""A benchmark's own numbers from its questions: over all, by group, over groups; and what warns that a model does not look."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hybridvlm.eval.benchmarks.definition import Benchmark, GroupValue

COLLAPSED = 0.6  # share of one letter from which a model is suspected to answer blindly
LEAST = 50  # replies below which no such share is told
EMPTY = 0.02  # share of empty replies that is told


class Answered(NamedTuple):
    """What is known of one question: its groups, whether it was answered rightly, the letter and the reply."""

    groups: Mapping[str, GroupValue]
    correct: bool
    letter: str | None
    reply: str | None
    parity: bool | None = None


def values_of(value: GroupValue | None) -> tuple[str, ...]:
    """A group's values: several of a question with several labels, none where it has none."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def scores(benchmark: Benchmark, answers: Sequence[Answered]) -> dict[str, Any]:
    """What results.json holds of a benchmark's own metric.

    Args:
        benchmark: says which groups there are, their order, and what is averaged.
        answers: of the questions that count.

    Returns:
        metric, value (the benchmark's own), micro, n, groups {field: {value: {accuracy, n}}}, macro {field: mean over its
        values}, and parity: the share that the protocol's own parser takes for right (None without one).
    """
    groups = {field: _by_value(benchmark, field, answers) for field in benchmark.groups}
    micro = _mean(a.correct for a in answers)
    macro = {field: _mean(cell["accuracy"] for cell in found.values()) for field, found in groups.items() if found}
    own = macro.get(benchmark.macro) if benchmark.macro else micro
    parity = [a.parity for a in answers if a.parity is not None]
    return {
        "metric": benchmark.metric,
        "value": own,
        "micro": micro,
        "n": len(answers),
        "groups": groups,
        "macro": macro,
        "parity": _mean(parity) if parity else None,
    }


def _by_value(benchmark: Benchmark, field: str, answers: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    cells: dict[str, list[bool]] = {value: [] for value in benchmark.order.get(field, ())}
    for answer in answers:
        for value in values_of(answer.groups.get(field)):
            cells.setdefault(value, []).append(answer.correct)
    return {value: {"accuracy": _mean(rights), "n": len(rights)} for value, rights in cells.items() if rights}


def _mean(values: Iterable[Any]) -> float | None:
    found = [float(value) for value in values]
    return sum(found) / len(found) if found else None


def replies(answers: Sequence[Answered]) -> dict[str, Any]:
    """How replies are spread: the most frequent letter and its share, shares without a letter and without any text."""
    given = [a for a in answers if a.reply is not None]
    if not given:
        return {"replies": 0, "letter": None, "letter_share": None, "unparsed": None, "empty": None, "distinct": 0}
    letters = collections.Counter(a.letter for a in given if a.letter is not None)
    letter, count = min(letters.items(), key=lambda item: (-item[1], item[0])) if letters else (None, 0)
    return {
        "replies": len(given),
        "letter": letter,
        "letter_share": count / len(given),
        "unparsed": sum(a.letter is None for a in given) / len(given),
        "empty": sum(not (a.reply or "").strip() for a in given) / len(given),
        "distinct": len({a.reply for a in given}),
    }


def warnings(spread: Mapping[str, Any]) -> list[str]:
    """What a reader must hear of the spread of replies."""
    n, lines = spread["replies"], list[str]()
    if n < LEAST:
        return lines
    if spread["distinct"] == 1:
        lines.append(f"all {n} replies are the same; the model may be broken, or not asked as it was trained")
    elif spread["letter_share"] > COLLAPSED:
        lines.append(
            f"{spread['letter_share']:.0%} of {n} replies are {spread['letter']}; the model may not be looking"
        )
    if spread["empty"] > EMPTY:
        lines.append(f"{spread['empty']:.1%} of {n} replies are empty")
    return lines
