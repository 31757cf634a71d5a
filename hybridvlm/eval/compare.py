"""`python -m hybridvlm.eval compare A B`: two runs, or logs of lmms-eval, task by task.

A and B are folders of results, samples files, or logs of lmms-eval; `A:str@0.25` names a reduced row of ours, else the dense
one is taken. With --paired only questions that both have answered count, and the interval is that of the differences.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

from hybridvlm.eval import statistics
from hybridvlm.eval.logs import Answer, only, read
from hybridvlm.options import InputError
from hybridvlm.storage import as_path

POWER, DIFFERENCE = 0.8, 0.01
SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs on one task.

    Attributes:
        n: questions of A and of B.
        accuracy: of A and of B.
        delta: B - A.
        interval: 95%, clustered by video (paired: of the differences; else Newcombe's); None with fewer than two videos.
        mcnemar: exact p, of a paired comparison.
        gained: questions that B alone has right.
        lost: questions that A alone has right.
        needed: questions that a difference of one point takes, at 80% power and 5%.
        groups: field -> value -> (n, accuracy of A, accuracy of B).
        notes: what a reader must know.
    """

    n: tuple[int, int]
    accuracy: tuple[float, float]
    delta: float
    interval: list[float] | None
    mcnemar: float | None
    gained: list[str]
    lost: list[str]
    needed: int | None
    groups: dict[str, dict[str, tuple[int, float, float]]]
    notes: list[str]


def compare(a: Sequence[Answer], b: Sequence[Answer], paired: bool) -> Comparison:
    """The difference of two runs on one task.

    Args:
        a: answers of the first.
        b: answers of the second.
        paired: on common questions alone, by their differences.

    Raises:
        InputError: where no question is common, or two logs disagree on an answer that both know.
    """
    notes = []
    # ids of one kind of log may be row numbers of the other: between kinds rows alone tell which question it is
    one_kind = len({x.kind for x in (*a, *b)}) == 1
    key = "key" if one_kind and {x.key for x in a} & {x.key for x in b} else "row"
    first = {getattr(x, key): x for x in a if x.correct is not None}
    second = {getattr(x, key): x for x in b if x.correct is not None}
    common = sorted((name for name in first if name in second), key=lambda name: (len(name), name))
    if not first or not second or (paired and not common):
        raise InputError("no scored question is common to both; are they of one task and split?")
    golds = [(first[x].gold, second[x].gold) for x in common]
    odd = [x for x, (g, h) in zip(common, golds, strict=True) if g and h and len(g) == len(h) == 1 and g != h]
    if odd:
        raise InputError(f"question {odd[0]}: one log has answer {first[odd[0]].gold}, the other {second[odd[0]].gold}")
    same = len(common) == len(first) == len(second)
    if not paired and same:
        notes.append("both answered the same questions: --paired gives a narrower interval")
    if paired and not same:
        notes.append(f"{len(common)} questions are common, of {len(first)} and {len(second)}")
    if any(not (first[x].cluster or second[x].cluster) for x in common):
        notes.append("the logs do not tell the videos: questions count as independent")
    if paired:
        first, second = ({x: own[x] for x in common} for own in (first, second))
    mine, theirs = ([bool(x.correct) for x in own.values()] for own in (first, second))
    gained = [x for x in common if second[x].correct and not first[x].correct]
    lost = [x for x in common if first[x].correct and not second[x].correct]
    p = (
        statistics.mcnemar([bool(first[x].correct) for x in common], [bool(second[x].correct) for x in common])
        if paired
        else None
    )
    delta, interval, variance = _paired(first, second, common) if paired else _apart(first, second)
    return Comparison(
        (len(mine), len(theirs)),
        (sum(mine) / len(mine), sum(theirs) / len(theirs)),
        delta,
        interval,
        p,
        gained,
        lost,
        _needed(variance),
        _groups(first, second),
        notes,
    )


def _clusters(first: dict[str, Answer], second: dict[str, Answer], names: Sequence[str]) -> list[str]:
    return [first[x].cluster or second[x].cluster or f"question {x}" for x in names]


def _paired(
    first: dict[str, Answer], second: dict[str, Answer], names: Sequence[str]
) -> tuple[float, list[float] | None, float]:
    """(difference, interval, variance per question, clusters included)."""
    mine, theirs = ([bool(own[x].correct) for x in names] for own in (first, second))
    clusters = _clusters(first, second, names)
    found = statistics.difference(theirs, mine, clusters)
    _, se, _ = statistics.cluster_se([b - a for a, b in zip(mine, theirs, strict=True)], clusters)
    return found.mean, found.interval, len(names) * se**2


def _apart(first: dict[str, Answer], second: dict[str, Answer]) -> tuple[float, list[float] | None, float]:
    variance, found = 0.0, []
    for own in (first, second):
        right, clusters = [bool(x.correct) for x in own.values()], _clusters(own, own, list(own))
        _, se, _ = statistics.cluster_se(right, clusters)
        variance += len(right) * se**2
        found.append(statistics.accuracy(right, clusters))
    return found[1].mean - found[0].mean, statistics.independent_difference(*found), variance


def _needed(variance: float) -> int | None:
    """Questions that a difference of DIFFERENCE takes, for a variance per question."""
    from scipy import stats

    if math.isnan(variance) or variance == 0:
        return None
    z = float(stats.norm.ppf(0.5 + statistics.LEVEL / 2) + stats.norm.ppf(POWER))
    return math.ceil(z**2 * variance / DIFFERENCE**2)


def _groups(first: dict[str, Answer], second: dict[str, Answer]) -> dict[str, dict[str, tuple[int, float, float]]]:
    cells: dict[str, dict[str, tuple[list[bool], list[bool]]]] = {}
    for side, own in enumerate((first, second)):
        for name, answer in own.items():
            groups = answer.groups or (second if side == 0 else first).get(name, answer).groups
            for field, values in groups.items():
                for value in values:
                    cells.setdefault(field, {}).setdefault(value, ([], []))[side].append(bool(answer.correct))
    return {
        field: {
            value: (max(len(a), len(b)), sum(a) / len(a), sum(b) / len(b)) for value, (a, b) in found.items() if a and b
        }
        for field, found in cells.items()
    }


def lines_of(task: str, found: Comparison) -> list[str]:
    """A comparison as lines of text."""
    n = f"{found.n[0]:,}" if found.n[0] == found.n[1] else f"{found.n[0]:,} and {found.n[1]:,}"
    interval = "-" if found.interval is None else "[{:+.2f}, {:+.2f}]".format(*(100 * x for x in found.interval))
    lines = [
        f"{task}: {n} questions",
        f"  A {100 * found.accuracy[0]:.2f}   B {100 * found.accuracy[1]:.2f}   B - A {100 * found.delta:+.2f} {interval} points"
        + ("" if found.mcnemar is None else f"   McNemar p {found.mcnemar:.2g}"),
        f"  only B is right on {_named(found.gained)}; only A on {_named(found.lost)}",
    ]
    if found.needed is not None:
        lines.append(
            f"  power: a difference of 1 point takes about {found.needed:,} questions like these (80% power, 5%)"
        )
    for field, values in found.groups.items():
        for value, (count, mine, theirs) in values.items():
            lines.append(f"    {field} {value} (n={count}): {100 * mine:.1f} -> {100 * theirs:.1f}")
    return lines + [f"  note: {note}" for note in found.notes]


def _named(names: Sequence[str]) -> str:
    shown = f" ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})" if names else ""
    return f"{len(names)}{shown}"


def _load(text: str) -> list[Answer]:
    path, method = text, "none"
    if not as_path(text).exists():
        # methods hold colons too, and so does the URL of a store
        for colon in re.finditer(r":(?!//)", text):
            if as_path(text[: colon.start()]).exists():
                path, method = text[: colon.start()], text[colon.end() :]
                break
    return only(read(as_path(path)), method or "none")


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.eval compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "a", metavar="A", help="folder or samples file, of this library or of lmms-eval; A:METHOD@BUDGET for a row"
    )
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--paired", action="store_true", help="common questions alone, by their differences")
    options = parser.parse_args(argv)
    try:
        a, b = _load(options.a), _load(options.b)
        tasks = [task for task in dict.fromkeys(x.task for x in a) if any(x.task == task for x in b)]
        if not tasks:
            names = [", ".join(dict.fromkeys(x.task for x in own)) for own in (a, b)]
            raise InputError(f"no task is common: A has {names[0]}; B has {names[1]}")
        for task in tasks:
            mine: Any = [x for x in a if x.task == task]
            print("\n".join(lines_of(task, compare(mine, [x for x in b if x.task == task], options.paired))))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
