"""The methods that people compare with, on the same checkpoints and questions: accuracy and time from pixels to the first token.

    python -m hybridvlm.analyze rivals --models tiny-reduced --limit 32
        one checkpoint, 32 validation questions of each embedded task
    python -m hybridvlm.analyze rivals --models finetuned=runs/h0/export,runs/h1/export,runs/h2/export --split test --limit 0
        three training seeds, all questions of the test split

The cells, each a reduction, are answered some at a time along with dense, batch by batch:

  ours      str, str-lookahead and str-calibrated, at --budget of the visual tokens (mean over layers). str-calibrated has layer
            weights that are measured on 8 validation videos, without their answers, of the first checkpoint
  mean      every other method, at the same mean share
  FLOPs     every other method, at the FLOPs that str has from pixels to the first token, tower and scoring included; those that
            have them at the same mean share are one cell for both
  with str  those before the decoder at the root of --budget, then str at the root of --budget: the same product

Where drops may start too late for a mean share, they start as early as it takes. A method that a checkpoint cannot take is left out
and named with its reason, as is one that misses what it was to meet by more than 2%. Answers are kept in OUTPUT/answers: a killed run
goes on where it stopped, with more checkpoints, tasks and questions too. Checkpoints of one configuration share their programs. A
cell's clock is that of the one run that answered most of it, and it is compared with dense in that run alone.
Written: rivals.json, rivals.md, rivals.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridvlm.analyze import calibrate, controls, over_seeds
from hybridvlm.analyze.ablate_checkpoints import Checkpoint, NamedModel, load_models, open_checkpoints, parse_models
from hybridvlm.analyze.ablate_checkpoints import reference as reference_of
from hybridvlm.analyze.ablate_report import shown
from hybridvlm.analyze.cells import REFERENCE, Cell, cell
from hybridvlm.analyze.common import COLOURS, Row, figure, markdown, output_folder, questions, write_figure, write_json
from hybridvlm.analyze.scores import score_questions
from hybridvlm.config import Reduction, to_dict
from hybridvlm.console import print_markdown, progress
from hybridvlm.eval import runner as eval_runner
from hybridvlm.eval.evaluate import dense_costs
from hybridvlm.eval.results import build_row, versions, write_atomic
from hybridvlm.eval.variants import DENSE, MATCHED, MATCHES, Variant
from hybridvlm.files import folder_lock
from hybridvlm.options import InputError, split
from hybridvlm.reduction.methods import METHODS, get_method, load_entry_points

TASKS = ("needle", "needle-scenes")
OURS, MEAN, FLOPS, BOTH, COMPOSED = "ours", "mean", "FLOPs", "mean and FLOPs", "with str"
# str and what is made of it are no rivals; of the controls, `random` and `uniform-input` stand for their kinds
NO_RIVALS = ("str-attention", "str-mamba", "uniform", "saliency", "oneshot-mamba", "oneshot-attention", "random-input")
OWN = (REFERENCE, "str-lookahead", "str-calibrated")
COSTS = (
    *(f"retention_{name}" for name in ("input", "mean", "final", "achieved")),
    *("flop_speedup", "total_flop_speedup", "changed", "prefill_ms", "ttft_ms", "ttft_speedup"),
)
MARKS = {OURS: "*", MEAN: "o", FLOPS: "s", BOTH: "p", COMPOSED: "^"}


class Asking(NamedTuple):
    """The checkpoints that are asked a task's questions, and the cells that they are asked under."""

    task: str
    checkpoints: list[Checkpoint]
    cells: list[Cell]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    models = "checkpoints, packaged or folders: NAME, or GROUP=A,B,C for the training seeds of one kind (default: tiny-reduced)"
    add("--models", nargs="+", default=["tiny-reduced"], metavar="[GROUP=]A,B", help=models)
    add("--tasks", default=",".join(TASKS), help="comma list of needle and needle-scenes (default: both)")
    add("--methods", help="comma list of rivals (default: all that are registered)")
    add("--budget", type=float, default=0.25, help="share of visual tokens, mean over layers (default: %(default)s)")
    add(
        "--schedule",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of str (default: the first checkpoint's)",
    )
    add("--score", nargs="+", default=[], metavar="KEY=VALUE", help="score options of str")
    add("--split", default="val", choices=("val", "test"), help="split of the benchmark (default: %(default)s)")
    add("--limit", type=int, default=64, help="first N questions of each task, 0 for all (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="questions per batch (default: %(default)s)")
    add("--output", type=pathlib.Path, help="folder of answers and results (default: results/rivals)")


def run(options: argparse.Namespace) -> int:
    """Answer every cell of every task for every checkpoint, then write the table and the picture."""
    for name, least in (("limit", 0), ("batch_size", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    tasks = split(options.tasks)
    if wrong := [name for name in tasks if name not in TASKS]:
        raise InputError(f"--tasks takes {' and '.join(TASKS)}, got {wrong[0]!r}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise InputError(f"--tasks takes {' and '.join(TASKS)}, each once, got {options.tasks!r}")
    methods = rivals() if options.methods is None else split(options.methods, "--methods")
    if len(set(methods)) < len(methods):
        raise InputError(f"--methods takes methods, each once, got {options.methods!r}")
    for name in methods:
        if get_method(name).phase == "none" or name in OWN:
            raise InputError(f"--methods takes the methods that str is compared with, got {name!r}")
    folder = output_folder(options, "rivals")
    with folder_lock(folder, "an analysis"):
        return _run(options, tasks, methods, folder)


def rivals() -> list[str]:
    """The methods that people compare with, by name, and those that others have registered."""
    load_entry_points()
    left_out = ("none", *OWN, *NO_RIVALS, *controls.NAMES)
    return [name for name in METHODS if name not in left_out]


def cells_of(base: Reduction, weighted: Reduction, methods: Sequence[str]) -> list[Cell]:
    """The cells of the table: `base` is str, `weighted` str-calibrated."""
    root = f"{math.sqrt(base.budget):.4g}"
    pairs = [f"{name}:{root}+{REFERENCE}:{root}" for name in methods if get_method(name).phase in ("input", "merge")]

    def as_(method: str, **changes: Any) -> Reduction:
        return dataclasses.replace(base, method=method, **changes)

    own = [(REFERENCE, base), ("str-lookahead", as_("str-lookahead")), ("str-calibrated", weighted)]
    cells = [cell(OURS, name, reduction, lower=True) for name, reduction in own]
    cells += [cell(MEAN, name, as_(name), lower=True) for name in methods]
    cells += [cell(FLOPS, f"{name}, FLOPs of str", as_(name), base, match_kind="total-flops") for name in methods]
    return cells + [cell(COMPOSED, name, as_(name, budget=1.0), lower=True) for name in pairs]


def _run(options: argparse.Namespace, tasks: Sequence[str], methods: Sequence[str], folder: pathlib.Path) -> int:
    models = load_models(parse_models(options.models))
    base = reference_of(options, [named.model.reduction for named in models])
    rows: list[Row] = []
    notes: list[str] = []
    cells = cells_of(base, calibrate.calibrated(base, _weights(models[0], notes)), methods)
    asked: Row = {}
    asking: list[Asking] = []
    for task in tasks:
        checkpoints = open_checkpoints(options, models, cells, folder / "answers", task)
        asking.append(Asking(task, checkpoints, _possible(checkpoints, cells, base.budget, notes)))
    _answer(asking)
    for task, checkpoints, possible in asking:
        rows += summarise(task, checkpoints, possible)
        samples = checkpoints[0].runner.task
        asked[task] = {"questions": len(samples.samples), "videos": len(samples.videos)}
    device = jax.devices()[0]
    results = {
        "rows": rows,
        "notes": notes,
        "metadata": {
            "command": options.command,
            "models": [{"group": named.group, "name": named.name} for named in models],
            "reference": to_dict(base),
            "split": options.split,
            "tasks": asked,
            "batch_size": options.batch_size,
            "versions": versions(),
            "device": {"platform": device.platform, "kind": device.device_kind},
        },
    }
    write_json(folder / "rivals.json", results)
    text = report(results)
    write_atomic(folder / "rivals.md", text)
    write_figure(folder / "rivals.png", picture(results))
    print_markdown(text)
    print(folder / "rivals.md")
    return 0


def _weights(named: NamedModel, notes: list[str]) -> list[float]:
    """Layer weights of str-calibrated, as `analyze calibrate` measures them by default; 1 everywhere where it cannot judge."""
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    model, defaults = named.model, parser.parse_args([])
    scored = score_questions(model, questions(model, defaults))
    try:
        layers = calibrate.judge(scored, model.config.pattern, defaults.top)
        return calibrate.layer_weights(layers, len(model.config.pattern), defaults.skip)
    except ValueError as error:
        _note(notes, f"str-calibrated trusts all layers of {named.name} alike: {error}")
        return [1.0] * len(model.config.pattern)


def _note(notes: list[str], line: str) -> None:
    """A line for people, once."""
    if line not in notes:
        notes.append(line)
        print(f"note: {line}", file=sys.stderr)


def _possible(checkpoints: Sequence[Checkpoint], cells: Sequence[Cell], budget: float, notes: list[str]) -> list[Cell]:
    """The cells that every checkpoint can take; `notes` is told what is left out, and why, and what misses its mean share `budget`."""
    good: list[Cell] = []
    left_out: dict[str, list[str]] = {}  # reason -> cells
    for one in cells:
        refused: dict[str, list[str]] = {}  # reason -> checkpoints
        for checkpoint in checkpoints:
            try:
                checkpoint.plan(one)
            except ValueError as error:  # the budget, or what a method cannot do under this schedule or on these layers
                refused.setdefault(str(error), []).append(checkpoint.name)
        for reason, names in refused.items():
            of = "" if len(names) == len(checkpoints) else f" (of {', '.join(names)})"
            left_out.setdefault(f"{reason}{of}", []).append(one.name)
        good += [] if refused else [one]
    for reason, names in left_out.items():
        _note(notes, f"left out: {', '.join(names)}: {reason}")
    if not any(one.name == REFERENCE for one in good):
        raise InputError("\n".join(notes))
    good = _once(checkpoints, good)
    for checkpoint in checkpoints:
        for line in checkpoint.planner.notes:
            if any(line.startswith(f"{one.name}: ") for one in good):
                _note(notes, line)
        for one in good:
            plan = checkpoint.plan(one)
            if one.set != FLOPS and plan is not None and abs(plan.retention_mean / budget - 1) > MATCHED:
                share = f"{MATCHES['mean'][1]} {plan.retention_mean:.3f} where {budget:g} was to be met"
                _note(notes, f"{one.name}: its {share}")
    return good


def _once(checkpoints: Sequence[Checkpoint], cells: Sequence[Cell]) -> list[Cell]:
    """The cells without those of equal FLOPs whose method has these at the same mean share already, of every checkpoint, which is
    marked as both."""
    own = next(one for one in cells if one.name == REFERENCE)

    def equal(one: Cell) -> bool:
        plans = ((checkpoint.plan(one), checkpoint.plan(own)) for checkpoint in checkpoints)
        return all(
            plan is not None and goal is not None and abs(plan.total_flop_ratio / goal.total_flop_ratio - 1) <= MATCHED
            for plan, goal in plans
        )

    both = {one.method for one in cells if one.set == MEAN and equal(one)}
    marked = [dataclasses.replace(one, set=BOTH) if one.set == MEAN and one.method in both else one for one in cells]
    return [one for one in marked if one.set != FLOPS or one.method not in both]


def _answer(asking: Sequence[Asking]) -> None:
    """Answer what is missing, every batch under dense and the cells beside it before the next one: their clocks tick side by side.

    So many cells at a time as a process holds the programs of, which all tasks and checkpoints share.
    """
    for _, checkpoints, cells in asking:
        for checkpoint in checkpoints:
            checkpoint.runner.variants = [DENSE, *cells]
    total = sum(checkpoint.runner.pending() for _, checkpoints, _ in asking for checkpoint in checkpoints)
    order = list(dict.fromkeys(one for _, _, cells in asking for one in cells))
    with progress(total, "answer", shown=total > 0) as bar:
        for start in range(0, len(order), eval_runner.TOGETHER):
            group = order[start : start + eval_runner.TOGETHER]
            for task, checkpoints, cells in asking:
                for checkpoint in checkpoints:
                    name = f"{task} {checkpoint.name}"

                    def count_on(count: int, label: str, name: str = name) -> None:
                        bar.set_postfix_str(f"{name} {label}", refresh=False)
                        bar.update(count)

                    variants: list[Variant] = [DENSE, *(one for one in cells if one in group)]
                    if any(checkpoint.missing(one) for one in variants):
                        checkpoint.runner.run(count_on, variants)


def summarise(task: str, checkpoints: Sequence[Checkpoint], cells: Sequence[Cell]) -> list[Row]:
    """One row per group and cell, dense first: accuracies over seeds, differences to dense and to str, shares, FLOPs and times."""
    groups: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        groups.setdefault(checkpoint.group, []).append(checkpoint)
    rows = []
    for group, members in groups.items():
        videos = [sample.video for sample in members[0].runner.task.samples]
        dense = np.stack([checkpoint.correct(DENSE) for checkpoint in members])
        own = next(one for one in cells if one.name == REFERENCE)
        reference = np.stack([checkpoint.correct(own) for checkpoint in members])
        for one in (DENSE, *cells):
            right = np.stack([checkpoint.correct(one) for checkpoint in members])
            row = {"task": task, "group": group, "cell": getattr(one, "name", "dense"), "set": getattr(one, "set", "")}
            row["accuracy"] = over_seeds.accuracy(right, videos).to_dict()
            if one != DENSE:
                row["to_dense"] = over_seeds.difference(right, dense, videos).to_dict()
            if one not in (DENSE, own):
                row["to_str"] = over_seeds.difference(right, reference, videos).to_dict()
            rows.append(row | _costs(members, one))
    return rows


def _costs(members: Sequence[Checkpoint], one: Variant) -> Row:
    """Medians over checkpoints: shares, FLOPs, times, how much faster than dense in the same run, the share of changed replies."""
    found = []
    for checkpoint in members:
        runner = checkpoint.runner

        def key(which: str, sample: Any, runner: Any = runner) -> str:
            return runner.key(one if which == "row" else DENSE, sample)

        row, extra = build_row(
            runner.task, one.method, one.budget, runner.plans(one), key, runner.store, dense_costs(runner)
        )
        timed = row["ttft_ms"] is not None and extra["dense_ttft_ms"] is not None
        found.append(row | {"ttft_speedup": extra["dense_ttft_ms"] / row["ttft_ms"] if timed else None})
    out: Row = {}
    for name in COSTS:
        values = [row[name] for row in found if row[name] is not None]
        out[name] = statistics.median(values) if values else None
    return out


def verdicts(rows: Sequence[Row]) -> str:
    """The first sentence of the report: which cells beat str, by intervals over seeds and over videos that leave out zero."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for group in dict.fromkeys(row["group"] for row in rows):
            mine = [r for r in rows if r["task"] == task and r["group"] == group and r.get("to_str")]
            better = [r for r in mine if beats(r["to_str"])]
            names = ", ".join(f"**{r['cell']}** ({shown(r['to_str'], True)} points)" for r in better)
            said = f"{names} beat str" if better else "none beats str"
            lines.append(f"{task}, {group}: of {len(mine)} cells, {said}.")
    return "\n".join(f"* {line}" for line in lines)


def beats(difference: Row) -> bool:
    """Whether a paired difference is above zero by its intervals over videos and, where there are several seeds, over these."""
    found = [interval for interval in (difference["ci95_seeds"], difference["ci95_videos"]) if interval is not None]
    return bool(found) and all(low > 0 for low, _ in found)


def report(results: Row) -> str:
    """rivals.md."""
    meta, rows = results["metadata"], results["rows"]
    groups = dict.fromkeys(m["group"] for m in meta["models"])
    names = "; ".join(f"{g}: {', '.join(m['name'] for m in meta['models'] if m['group'] == g)}" for g in groups)
    asked = ", ".join(f"{n['questions']} of {task} ({n['videos']} videos)" for task, n in meta["tasks"].items())
    parts = [
        f"# Methods that people compare with, {meta['split']} questions: {asked}",
        verdicts(rows),
        f"`{meta['command']}`\n\nCheckpoints: {names}. Accuracies and differences in points with 95% intervals: Student's over "
        "training seeds where a group has several that differ, else clustered by video. Differences are paired. "
        "ms and faster: from pixels to the first token, tower included, medians over batches, then over checkpoints; faster is "
        "against dense in the same run of each, and ms of different runs are not comparable. Empty: no video was encoded but in a "
        "first, untimed call. changed: the share of replies that differ from dense's. EVS is off but in cells that name it.",
    ]
    for task in meta["tasks"]:
        for group in groups:
            mine = [r for r in rows if r["task"] == task and r["group"] == group]
            title = f"## {task}" + (f", {group}" if len(groups) > 1 else "")
            parts.append(f"{title}\n\n{markdown([_line(row) for row in mine])}")
    if results["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {line}" for line in results["notes"]))
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> Row:
    """A row as people read it."""
    ms, faster = row["ttft_ms"], row["ttft_speedup"]
    return {
        "cell": row["cell"],
        "at": row["set"],
        "accuracy %": shown(row["accuracy"]),
        "to dense": shown(row.get("to_dense"), True),
        "to str": shown(row.get("to_str"), True),
        "kept % in / mean / last": " / ".join(
            f"{100 * row[f'retention_{name}']:.0f}" for name in ("input", "mean", "final")
        ),
        "FLOPs say": f"{row['total_flop_speedup']:.2f}x",
        "ms": "" if ms is None else f"{ms:.0f}",
        "faster": "" if faster is None else f"{faster:.2f}x",
        "changed %": f"{100 * row['changed']:.0f}",
    }


def picture(results: Row) -> Any:
    """Accuracy against time from pixels to the first token, in percent of dense's in the same run, a panel for each task and group;
    marks by set, names beside the points."""
    rows = [row for row in results["rows"] if row["ttft_speedup"] is not None] or results["rows"]
    panels_of = list(dict.fromkeys((row["task"], row["group"]) for row in rows))
    fig, panels = figure(len(panels_of), 1, width=7.2, height=6.4)
    for panel, (task, group) in zip(panels[0], panels_of, strict=True):
        mine = [row for row in rows if (row["task"], row["group"]) == (task, group)]
        for number, (name, mark) in enumerate({"": "D", **MARKS}.items()):
            points = [row for row in mine if row["set"] == name]
            x = [100 / (row["ttft_speedup"] or math.nan) for row in points]
            y = [100 * row["accuracy"]["mean"] for row in points]
            size = 130 if name == OURS else 30
            panel.scatter(x, y, size, color=COLOURS[number], marker=mark, label=name or "dense", zorder=3)
            for px, py, row in zip(x, y, points, strict=True):
                label = row["cell"].removesuffix(", FLOPs of str")
                panel.annotate(label, (px, py), fontsize=5.5, xytext=(3, 2), textcoords="offset points")
        panel.set(
            title=f"{task}, {group}", xlabel="time from pixels to the first token, % of dense", ylabel="accuracy, %"
        )
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.legend(fontsize=8, frameon=False, loc="lower right")
    return fig
