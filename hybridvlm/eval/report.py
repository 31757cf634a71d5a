"""The table for people: on the terminal, as report.md, and as two pictures."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.console import markdown_table, percent, print_table
from hybridvlm.eval import report_benchmarks
from hybridvlm.eval.results import write_atomic
from hybridvlm.inference.thinking import UNFINISHED

PICTURES = {
    "accuracy_vs_retention.png": (
        "retention_mean",
        "visual tokens kept, mean over layers (methods of a budget side by side)",
    ),
    "accuracy_vs_speedup.png": ("speedup", "prefill speed-up over dense, measured"),
}
_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#994f00",
    "#006cd1",
    "#777777",
    "#000000",
)
_MARKS = "osD^vPX<>*"
PANELS = 4  # side by side in a picture


def _range(interval: Sequence[float] | None, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    return "-" if interval is None else f"[{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _flops(row: dict[str, Any]) -> str:
    parts = [row[f"{part}_flops"] for part in ("decoder", "scoring", "vision")]
    return "-" if None in parts else " / ".join(f"{value / 1e9:.3g}" for value in parts)


def name(row: dict[str, Any]) -> str:
    """A row's name: its method, `dense` for none."""
    return "dense" if row["method"] == "none" else row["method"]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row as the texts of the main table, by column."""
    dense = row["method"] == "none"
    memory = row["peak_bytes"]
    return {
        "method": name(row),
        "budget": f"{row['budget']:g}",
        "accuracy %": f"{percent(row['accuracy'])} {_range(row['ci95'])}",
        "to dense, points": ""
        if dense
        else f"{percent(row['delta'], sign=True)} {_range(row['delta_ci95'], sign=True)}",
        "McNemar p": "" if dense else _number(row["mcnemar_p"], ".2g"),
        "two-hop %": percent(row["accuracy_two_hop"]),
        "kept %: mean / final": f"{percent(row['retention_mean'])} / {percent(row['retention_final'])}",
        "prefill ms": _number(row["prefill_ms"], ".1f"),
        "speed-up": _number(row["speedup"], ".2f") + ("" if row["speedup"] is None else "x"),
        "FLOPs say": _number(row["flop_speedup"], ".2f") + ("" if row["flop_speedup"] is None else "x"),
        "input %": percent(row["retention_input"]),
        "from pixels: FLOPs say": _number(row["total_flop_speedup"], ".2f")
        + ("x" if row["total_flop_speedup"] else ""),
        "ms to first token": _number(row["ttft_ms"], ".1f"),
        "GFLOPs: decoder / scoring / tower": _flops(row),
        "changed %": "" if dense else percent(row["changed"]),
        "decode ms": _number(row["decode_ms"], ".1f"),
        "peak MiB": _number(None if memory is None else memory / 2**20, ".0f"),
        "compiles": _number(row["compiles"], "d"),
        "no answer": str(row["parse_failures"]),
        "not asked": str(row["unanswered"]),
    }


# The columns of the terminal's table, the most important first: a narrow terminal shows the others below.
_ORDER = (
    *("method", "budget", "accuracy %", "to dense, points", "FLOPs say", "speed-up", "kept %: mean / final"),
    *("from pixels: FLOPs say", "changed %", "input %", "ms to first token", "GFLOPs: decoder / scoring / tower"),
    *("prefill ms", "decode ms", "McNemar p", "two-hop %", "peak MiB", "compiles", "no answer", "not asked"),
)
READING = (
    "A row is the model under one method: accuracy and its difference to dense with 95% intervals by video, the speed-up that "
    "the plan's FLOPs predict and the one that was measured, the visual tokens kept."
)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table: a difference whose interval leaves out zero is red where it is a loss, else green."""
    texts = [cells(row) for row in rows]
    # A column without anything in it is left to the report.
    columns = [column for column in _ORDER if any(text[column] not in ("", "-", "0") for text in texts)]
    texts = [{column: text[column] for column in columns} for text in texts]

    def style(number: int, column: str) -> str:
        row = rows[number]
        if column == "method":
            return "bold cyan"
        if column == "to dense, points" and row["method"] != "none" and row["delta_ci95"] is not None:
            low, high = row["delta_ci95"]
            return "red" if high < 0 else "green" if low > 0 else ""
        return "bold" if row["method"] == "none" else ""

    print_table(texts, keys=2, style=style)


def print_benchmark(about: dict[str, Any], rows: Sequence[dict[str, Any]], details: Sequence[dict[str, Any]]) -> None:
    """Print how a published benchmark was asked, and its own metric."""
    print(f"\n{report_benchmarks.asked(about)}\n")
    labelled = [(f"{name(row)} {row['budget']:g}", extra) for row, extra in zip(rows, details, strict=True)]
    print_table(report_benchmarks.own(labelled), keys=1)


def warnings_of(rows: Sequence[dict[str, Any]], details: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must not miss: methods that changed nothing, replies that are no answer or never vary."""
    lines = []
    for row, extra in zip(rows, details, strict=True):
        label = f"{row['task']}: {name(row)} at {row['budget']:g}"
        if row["unanswered"]:
            lines.append(
                f"{label}: {row['unanswered']} questions are on files that could not be read; they are not among the {row['n']} "
                "that the accuracy is of (a file that is put in its place is asked about by the next run; to have the same one tried "
                "again, remove its lines from samples.jsonl)"
            )
        # that it dropped what its plan says is counted in every batch
        if row["method"] != "none" and row["n"] and extra["predictions_changed"] == 0 and row["retention_mean"] > 0.95:
            lines.append(
                f"{label} gave the same {row['n']} replies as dense, and kept {row['retention_mean']:.1%} of the visual tokens"
            )
        if row["parse_failures"]:
            lines.append(f"{label}: {row['parse_failures']} of {row['n']} replies were no answer; they count as wrong")
        if extra["thinking_unfinished"]:
            lines.append(
                f"{label}: {extra['thinking_unfinished']} of those replies {UNFINISHED}; give more by --think-tokens or "
                "--buckets max_new=N, or turn it off by --thinking off"
            )
        if "reply_warnings" in extra:
            lines += [f"{label}: {line}" for line in extra["reply_warnings"]]
        elif row["n"] >= 20 and extra["most_common_reply"] > 0.9:
            lines.append(
                f"{label}: one reply makes up {extra['most_common_reply']:.0%} of all; the model may not be looking"
            )
    return lines


def _by(field: str, rows: Sequence[tuple[Any, Mapping[str, float], Mapping[str, Any]]]) -> list[dict[str, str]]:
    """The table of accuracy by a field, from (row, value of the field -> accuracy, the row's details)."""
    values = list(dict.fromkeys(value for _, shares, _ in rows for value in shares))
    return [
        {f"accuracy % by {field}": f"{name(row)} {row['budget']:g}"}
        | {f"{v} (n={extra.get(f'n_by_{field}', {}).get(v, 0)})": percent(shares.get(v)) for v in values}
        for row, shares, extra in rows
    ]


def markdown(results: dict[str, Any]) -> str:
    """report.md: what was run, the tables, what to beware of, the plans."""
    rows, details, meta = results["rows"], results["details"], results["metadata"]
    parts = [f"# {meta['model']} on {', '.join(dict.fromkeys(row['task'] for row in rows))}", f"`{meta['command']}`"]
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items())
    parts.append(
        f"{meta['device']['count']} x {meta['device']['kind']}, {meta['cpus']} CPU cores, {meta['dtype']}; {versions}."
    )
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [(row, extra) for row, extra in zip(rows, details, strict=True) if row["task"] == task]
        videos = mine[0][1]["videos"]
        parts.append(f"## {task}: {mine[0][0]['n']} questions on {videos} videos")
        about = results.get("tasks", {}).get(task)
        if about is not None:
            parts.append(report_benchmarks.asked(about))
        parts.append(markdown_table([cells(row) for row, _ in mine]))
        if about is not None:
            labelled = [(f"{name(row)} {row['budget']:g}", extra) for row, extra in mine]
            tables = [report_benchmarks.own(labelled), *report_benchmarks.groups(labelled)]
            parts += [markdown_table(table) for table in tables]
            continue
        parts.append(markdown_table(_by("type", [(row, row["by_type"], extra) for row, extra in mine])))
        if any(extra.get("by_moment") for _, extra in mine):
            parts.append(
                markdown_table(_by("moment", [(row, extra.get("by_moment", {}), extra) for row, extra in mine]))
            )
    if results["comparisons"]:
        parts.append("## Paired with one another")
        table = [
            {
                "task": c["task"],
                "questions": f"{c['subset'].replace('_', '-')} (n={c['n']})",
                "method": f"{c['method']} {c['budget']:g}: {percent(c['accuracy'])}",
                "against": f"{c['against']} {c['against_budget']:g}: {percent(c['against_accuracy'])}",
                "points": f"{100 * c['delta']:+.1f} {_range(c['delta_ci95'], sign=True)}",
                "McNemar p": f"{c['mcnemar_p']:.2g}",
            }
            for c in results["comparisons"]
        ]
        parts.append(markdown_table(table))
    beware = warnings_of(rows, details) + meta["notes"]
    if beware:
        parts.append("## Beware\n\n" + "\n".join(f"- {line}" for line in beware))
    parts.append("\n".join(f"![{file}]({file})" for file in PICTURES))
    parts.append("## How to read it\n\n" + _legend(details, meta))
    plans = [
        f"### {e['task']}: {e['method']} at {e['budget']:g}\n\n```\n{text}\n```"
        for e in details
        for text in e["explained"]
    ]
    if plans:
        parts.append("## Plans\n\n" + "\n\n".join(plans))
    return "\n\n".join(parts) + "\n"


def _legend(details: Sequence[dict[str, Any]], meta: dict[str, Any]) -> str:
    runs: dict[str | None, list[str]] = {}
    for extra in details:
        label = "dense" if extra["method"] == "none" else f"{extra['method']} {extra['budget']:g}"
        runs.setdefault(extra["timing_run"], []).append(label)
    clocks = "; ".join(f"run {run}: {', '.join(dict.fromkeys(names))}" for run, names in runs.items())
    lines = [
        "Accuracy and its differences carry 95% intervals clustered by video. McNemar's test is exact and takes "
        "questions as independent. A reply that is no answer counts as wrong; nothing is guessed. "
        "Questions on files that could not be read are not asked, and are not counted in the accuracy.",
        f"Prefill and decode are medians over batches of {meta['batch_size']}, in milliseconds per question, device "
        "work awaited; prefill runs from embeddings to the first token's logits, scoring and compaction included, the "
        f"vision tower apart ({_number(meta['encode_ms'], '.1f')} ms per video). Compilation and each program's first "
        "call are off the clock.",
        "A row's clock is that of one run, and its speed-up is against dense in the same run and on the same batches "
        f"({clocks}). Milliseconds of different runs are not comparable.",
        "Peak memory is that of the row's own compiled programs, as the compiler states it.",
        '"FLOPs say" is the speed-up that the plan predicts for the decoder, scoring left out; "from pixels" it is of vision tower, '
        "scoring and decoder together. Milliseconds to the first token are those of the tower, a video by itself, and of prefill.",
        '"changed" is the share of replies that differ from dense: the methods took part. That every batch kept what its plan says '
        "was checked when it was answered.",
        "EVS is off, in dense too, but in rows that name it: "
        + (", ".join(f"{e['method']} {e['budget']:g}" for e in details if "evs" in e["method"]) or "none does")
        + ".",
    ]
    return "\n".join(f"- {line}" for line in lines)


def picture(rows: Sequence[dict[str, Any]], axis: str, label: str) -> bytes:
    """A PNG: accuracy with its interval against `axis`, one panel per task, one colour and mark per method."""
    import matplotlib.figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(name(row) for row in rows))
    wide = min(len(tasks), PANELS)
    high = -(-len(tasks) // wide)
    figure = matplotlib.figure.Figure(figsize=(6.4 * wide, 4.4 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    for panel, task in zip(panels, tasks, strict=False):
        for number, method in enumerate(methods):
            points = sorted(
                (r for r in rows if r["task"] == task and name(r) == method and r[axis] and r["n"]),
                key=lambda r: r[axis],
            )
            if not points:
                continue
            # at one budget all methods keep the same share: set them side by side, or only the last one is seen
            shift = 0.012 * (number - len(methods) / 2) if axis == "retention_mean" and method != "dense" else 0.0
            x, y = [r[axis] + shift for r in points], [100 * r["accuracy"] for r in points]
            style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKS[number % len(_MARKS)]}
            panel.plot(x, y, label=method, linestyle="-" if len(points) > 1 else "", linewidth=1, **style)
            for px, py, row in zip(x, y, points, strict=True):
                if row["ci95"] is not None:
                    low, high = (100 * v for v in row["ci95"])
                    panel.errorbar(px, py, yerr=[[py - low], [high - py]], color=style["color"], linewidth=1, capsize=2)
        if axis == "speedup":
            panel.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        else:
            panel.set_xlim(0, 1.05)
        panel.set(title=task, xlabel=label, ylabel="accuracy, % (95% interval)")
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def write_report(folder: pathlib.Path, results: dict[str, Any]) -> None:
    """report.md and its two pictures."""
    for file, (axis, label) in PICTURES.items():
        write_atomic(folder / file, picture(results["rows"], axis, label))
    write_atomic(folder / "report.md", markdown(results))
