"""What a report tells of a published benchmark: how it was asked, its own metric, its groups, how replies were spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridvlm.console import percent

LARGE = 24  # values of a group from which on its table is left to results.json


def asked(about: dict[str, Any]) -> str:
    """How a benchmark was asked, in one paragraph."""
    frames, subtitles = about["frames"], about["subtitles"]
    parts = [
        f"{about['title']}: {about['questions']['asked']:,} questions asked of {about['questions']['whole']:,}",
        f"protocol {about['protocol']} ({about['version']})" + "".join(f", {change}" for change in about["changed"]),
        f"prompts {about['prompt_hash']}, annotations {about['annotations']['file']} {about['annotations']['sha256']}",
    ]
    if frames is not None:
        sizes = ", ".join(f"{height}x{width}" for height, width in about["pixels"][:3])
        more = f" and {len(about['pixels']) - 3} more sizes" if len(about["pixels"]) > 3 else ""
        used = f"{frames['least']} to {frames['most']} (median {frames['median']})"
        parts.append(f"frames by {frames['rule']}, {frames['asked']} asked for, {used} used, of {sizes}{more} pixels")
    else:
        parts.append("no video shown")
    shown = (
        f"subtitles by {subtitles['rule']}, {subtitles['videos_without']} videos without"
        if subtitles["rule"]
        else "no subtitles"
    )
    parts += [shown, f"replies parsed by {about['parser']}", f"chance {100 * about['chance']:.1f} %"]
    if about["missing"]["questions"]:
        word = {"wrong": "count as wrong", "skip": "are left out"}.get(about["missing"]["rule"], "")
        parts.append(f"{about['missing']['questions']:,} questions on videos that cannot be read {word}")
    return "; ".join(parts) + "."


def own(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, str]]:
    """The benchmark's own metric, a row of the table per method.

    Args:
        rows: name of a row and its details.
    """
    table = []
    for name, extra in rows:
        found, spread = extra["scores"], extra["replies"]
        guesses = " (it guesses where it finds none)" if found["parity_guesses"] else ""
        table.append(
            {
                "method": name,
                found["metric"]: percent(found["value"], 2),
                "over all questions": f"{percent(found['micro'], 2)} (n={found['n']:,})",
                "by the protocol's parser": f"{percent(found['parity'], 2)}, {found['parity_parser']}{guesses}",
                "replies without a letter": percent(spread["unparsed"], 2),
                "most frequent letter": f"{spread['letter']} {percent(spread['letter_share'], 2)}"
                if spread["letter"]
                else "-",
                "not scored": str(extra.get("unscored", 0)),
            }
        )
    return table


def groups(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[list[dict[str, str]]]:
    """Accuracy by each group's values, a table per group."""
    tables = []
    for field in rows[0][1]["scores"]["groups"]:
        values = rows[0][1]["scores"]["groups"][field]
        if not values or len(values) > LARGE:
            continue
        table = []
        for name, extra in rows:
            cells = extra["scores"]["groups"].get(field, {})
            row = {f"% by {field}": name}
            row |= {f"{v} (n={c['n']})": percent(cells.get(v, {}).get("accuracy"), 2) for v, c in values.items()}
            table.append(row | {"mean over them": percent(extra["scores"]["macro"].get(field), 2)})
        tables.append(table)
    return tables
