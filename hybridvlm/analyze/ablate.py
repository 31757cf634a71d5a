"""Ablations on the embedded benchmark: every cell is a reduction that differs from one reference in one thing.

    python -m hybridvlm.analyze ablate --models tiny-reduced --sets scores --limit 140
        one checkpoint; intervals are over videos
    python -m hybridvlm.analyze ablate --models hybrid=runs/h0,runs/h1,runs/h2 transformer=runs/t0,runs/t1,runs/t2 --sets layers,budgets
        groups of training seeds; intervals are over seeds, all cells on the same questions
    python -m hybridvlm.analyze ablate --models tiny --sets "" --cell "late: start=8" --cell "sharp: steepness=30 match=on"
        cells of your own: fields of the reduction, its schedule and its score; match=on solves it to the reference's FLOPs

The reference is `str` at --budget with the first checkpoint's own schedule (the embedded benchmark's where it has none). Cells
that drop elsewhere are solved to the reference's predicted FLOPs. A cell that cannot meet its budget is left out and named.
Answers are kept in OUTPUT/answers, one file per set of weights: a killed run goes on where it stopped, and a cell that is done
is not run again, also when other cells or checkpoints are asked for. Checkpoints of one configuration share their programs, so
name all seeds in one command: compiling a cell's program costs more than the answers of one checkpoint. On CPU the environment
variable XLA_FLAGS=--xla_backend_optimization_level=1 halves the time of the compiler.
Written: ablation.json, ablation.md, ablation.png, budgets.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.analyze import over_seeds
from hybridvlm.analyze.cells import CLAIMS, REFERENCE, SETS, Cell, CellPlanner, cells_of
from hybridvlm.analyze.common import (
    COLOURS,
    Row,
    base_reduction,
    figure,
    load_embedded,
    markdown,
    output_folder,
    short,
    write_figure,
    write_json,
)
from hybridvlm.config import Reduction, to_dict
from hybridvlm.console import print_markdown, progress
from hybridvlm.eval.results import SampleStore, write_atomic
from hybridvlm.eval.runner import DENSE, Runner, Variant, fingerprint, versions
from hybridvlm.eval.tasks import TaskOptions, build_task
from hybridvlm.files import folder_lock
from hybridvlm.inference.model import Model
from hybridvlm.options import InputError, override
from hybridvlm.reduction import BudgetError, ReductionPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    models = "checkpoints, packaged or folders: NAME, or GROUP=A,B,C for the training seeds of one kind (default: tiny-reduced)"
    add("--models", nargs="+", default=["tiny-reduced"], metavar="[GROUP=]A,B", help=models)
    sets = "; ".join(f"{name} ({what})" for name, (_, what) in SETS.items()).replace("%", "%%")
    add("--sets", default=",".join(SETS), help=f"comma list of sets of cells: {sets} (default: all)")
    add(
        "--cell", action="append", default=[], metavar="'NAME: KEY=VALUE …'", help="a cell of your own; may be repeated"
    )
    add("--budget", type=float, default=0.25, help="of the reference, mean over layers (default: %(default)s)")
    add(
        "--schedule",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of the reference (default: the first checkpoint's)",
    )
    add("--score", nargs="+", default=[], metavar="KEY=VALUE", help="score options of the reference")
    add("--split", default="val", choices=("val", "test"), help="split of the benchmark (default: %(default)s)")
    add("--limit", type=int, default=280, help="first N questions, 0 for all 1,024 (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="questions per batch (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the cells and what they would cost, and stop")
    add("--output", type=pathlib.Path, help="folder of answers and results (default: results/ablation)")


@dataclasses.dataclass
class Checkpoint:
    """One set of weights. Those of one configuration share compiled programs."""

    group: str
    name: str
    model: Model
    reduction: Reduction | None
    runner: Runner
    planner: CellPlanner

    def run(self, cell: Variant, progress: Any) -> None:
        """Answer what is missing of one cell."""
        # without dense: nothing is timed here
        self.runner.run(progress, [cell])

    def missing(self, cell: Variant) -> set[tuple[str, str]]:
        """(file, key) of the answers to a cell that are still to be found."""
        store = self.runner.store
        keys = (self.runner.key(cell, sample) for sample in self.runner.task.samples)
        return {(str(store.path), key) for key in keys if key not in store}

    def plan(self, cell: Variant) -> ReductionPlan | None:
        """The plan of the only bucket (BudgetError where there is none)."""
        return self.planner(cell, next(iter(self.runner.buckets.values())))[1]

    def correct(self, cell: Variant) -> np.ndarray:
        """Which questions are answered rightly, bool [n]."""
        return np.array([self.runner.store.get(self.runner.key(cell, s))["correct"] for s in self.runner.task.samples])


def parse_models(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(group, checkpoint) pairs of "GROUP=A,B" and "A,B" (each its own group); InputError for a name twice."""
    pairs = []
    for text in texts:
        group, equals, rest = text.partition("=")
        names = [n for n in (rest if equals else text).split(",") if n]
        if not names or (equals and not group):
            raise InputError(f"--models takes NAME or GROUP=A,B, got {text!r}")
        pairs += [(group if equals else short(n), n) for n in names]
    if len(set(pairs)) < len(pairs):
        raise InputError(f"--models names a checkpoint twice in one group: {' '.join(texts)}")
    return pairs


def reference(options: argparse.Namespace, own: Sequence[Reduction | None]) -> Reduction:
    """The reduction that cells differ from: str at --budget with the first own schedule of the models, changed as told."""
    base = dataclasses.replace(base_reduction(own), method="str", budget=options.budget, kind="mean")
    return dataclasses.replace(
        base,
        schedule=override(base.schedule, options.schedule, "--schedule"),
        score=override(base.score, options.score, "--score"),
    )


def load_checkpoints(
    options: argparse.Namespace, named: Sequence[tuple[str, str]], folder: pathlib.Path
) -> list[Checkpoint]:
    """The checkpoints of (group, name) pairs, with their answers so far in `folder`."""
    folder.mkdir(exist_ok=True)
    shared: dict[str, tuple[Model, CellPlanner]] = {}
    stores: dict[str, SampleStore] = {}
    out = []
    for group, name in named:
        model = load_embedded(name)
        # answers are told apart by weights, not by names
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, name=""))
        kind = repr((model.config, model.buckets, model.style, model.family.NAME))
        first, planner = shared.setdefault(kind, (model, CellPlanner(model)))
        own = dataclasses.replace(model, programs=first.programs)
        weights = fingerprint(model.params)
        store = stores.setdefault(weights, SampleStore(folder / f"{weights}.jsonl"))
        task = build_task("needle", TaskOptions(model.config, split=options.split, limit=options.limit))
        runner = Runner(own, task, [], planner, store, batch_size=options.batch_size, weights=weights)
        out.append(Checkpoint(group, name, own, model.reduction, runner, planner))
    return out


def run(options: argparse.Namespace) -> int:
    """Answer every cell for every checkpoint, then write tables and pictures."""
    if options.limit < 0 or options.batch_size < 1:
        raise InputError(
            f"--limit must be at least 0 and --batch-size at least 1, got {options.limit}, {options.batch_size}"
        )
    folder = output_folder(options, "ablation")
    with folder_lock(folder, "an analysis"):
        return _run(options, folder)


def _run(options: argparse.Namespace, folder: pathlib.Path) -> int:
    checkpoints = load_checkpoints(options, parse_models(options.models), folder / "answers")
    base = reference(options, [c.reduction for c in checkpoints])
    cells = cells_of([s for s in options.sets.split(",") if s], base, options.cell)
    results = answer_cells(options, checkpoints, cells)
    if results is None:
        return 0
    write_json(folder / "ablation.json", results)
    text = report(results)
    write_atomic(folder / "ablation.md", text)
    for name, fig in pictures(results).items():
        write_figure(folder / name, fig)
    print_markdown(text)
    print(folder / "ablation.md")
    return 0


def answer_cells(options: argparse.Namespace, checkpoints: Sequence[Checkpoint], cells: Sequence[Cell]) -> Row | None:
    """Show the plan, answer what is missing, and put it together (None where options.dry_run stops after the plan)."""
    possible, notes = _possible(checkpoints, cells)
    work = _work(checkpoints, cells, possible)
    print(_plan_table(checkpoints, cells, possible, work), flush=True)
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    if options.dry_run:
        return None
    _answer(checkpoints, work)
    return summarise(checkpoints, cells, possible) | {
        "notes": notes,
        "metadata": {
            "command": options.command,
            "models": [{"group": c.group, "name": c.name, "pattern": c.model.config.pattern} for c in checkpoints],
            "reference": to_dict(cells[0].reduction),
            "split": options.split,
            "questions": len(checkpoints[0].runner.task.samples),
            "videos": len(checkpoints[0].runner.task.videos),
            "versions": versions(),
        },
    }


def _possible(checkpoints: Sequence[Checkpoint], cells: Sequence[Cell]) -> tuple[set[tuple[int, str]], list[str]]:
    """(checkpoint, cell) pairs whose plan can be settled, and what is to be said of the others."""
    possible, notes = set(), []
    for i, checkpoint in enumerate(checkpoints):
        for cell in cells:
            try:
                checkpoint.plan(cell)
            except BudgetError as error:
                line = f"{checkpoint.group}: {cell.name} is left out: {error}"
                if line not in notes:
                    notes.append(line)
                continue
            possible.add((i, cell.name))
        notes += [f"{checkpoint.group}: {line}" for line in checkpoint.planner.notes]
    if not possible:
        raise InputError("\n".join(notes))
    return possible, list(dict.fromkeys(notes))


def _work(checkpoints, cells, possible) -> list[tuple[int, Variant, int]]:
    """(checkpoint, cell, answers missing), all checkpoints of one configuration one after another for each cell."""
    work: list[tuple[int, Variant, int]] = []
    seen: set[tuple[str, str]] = set()  # cells of two sets may be one and the same
    order = sorted(
        range(len(checkpoints)), key=lambda i: [id(c.model) for c in checkpoints].index(id(checkpoints[i].model))
    )
    for cell in (DENSE, *cells):
        for i in order:
            if cell == DENSE or (i, cell.name) in possible:
                missing = checkpoints[i].missing(cell) - seen
                seen |= missing
                if missing:
                    work.append((i, cell, len(missing)))
    return work


def _plan_table(checkpoints, cells, possible, work) -> str:
    """The cells with what they keep and cost, and how long the rest may take."""
    rows = []
    for cell in cells:
        own = [c for i, c in enumerate(checkpoints) if (i, cell.name) in possible]
        if not own:
            continue
        plan = own[0].plan(cell)
        rows.append(
            {
                "set": cell.set,
                "cell": cell.name,
                "method": plan.method,
                "budget": f"{plan.budget:.3g} {plan.kind}",
                "FLOPs / dense": plan.flop_ratio,
                "kept mean": plan.retention_mean,
                "kept last": plan.retention_final,
                "drops": len(plan.drops),
                "answers to find": sum(n for i, c, n in work if c == cell),
            }
        )
    return f"{markdown(rows)}\n{_estimate(checkpoints, work)}"


def _estimate(checkpoints, work) -> str:
    """Seconds that the missing answers take, timed on one dense batch where something is missing."""
    if not work:
        return "nothing is left to be answered"
    first = checkpoints[work[0][0]]
    sample = first.runner.task.samples[0]
    start = time.perf_counter()
    pixels, seconds = first.runner.task.frames(sample.video)
    visual = first.model.encode(np.repeat(np.asarray(pixels)[None], first.runner.batch_size, axis=0))
    batch, _ = first.model.batch([sample.question] * first.runner.batch_size, [seconds] * first.runner.batch_size, None)
    first.model.generate(batch, visual)
    compile_seconds = time.perf_counter() - start
    start = time.perf_counter()
    first.model.generate(batch, visual)
    each = (time.perf_counter() - start) / first.runner.batch_size
    programs, total = {}, 0.0
    for i, cell, missing in work:
        plan = None if cell == DENSE else checkpoints[i].plan(cell)
        total += missing * each * (1.0 if plan is None else plan.flop_ratio)
        programs[id(checkpoints[i].model), cell] = 1.0 if plan is None else 1.0 + 0.2 * len(plan.drops)
    building = compile_seconds * sum(programs.values())
    return (
        f"{sum(n for _, _, n in work)} answers to find, {1e3 * each:.0f} ms each when dense: about {total / 60:.0f} min, and "
        f"about {building / 60:.0f} min for the compiler ({len(programs)} programs); the answers found are kept"
    )


def _answer(checkpoints, work) -> None:
    with progress(sum(n for _, _, n in work), "answer") as bar:
        for i, cell, _ in work:
            checkpoint = checkpoints[i]
            bar.set_postfix_str(f"{checkpoint.name} {getattr(cell, 'name', 'dense')}", refresh=True)
            checkpoint.run(cell, lambda count, _label: bar.update(count))


# -- what came out --------------------------------------------------------------------------------------------------------


def summarise(
    checkpoints: Sequence[Checkpoint], cells: Sequence[Cell], possible: set[tuple[int, str]]
) -> dict[str, Any]:
    """rows (one per group and cell), claims (paired differences) and groups (differences between groups)."""
    task = checkpoints[0].runner.task
    videos = [s.video for s in task.samples]
    hops = np.array([s.two_hop for s in task.samples])
    kinds = np.array([s.type for s in task.samples])
    groups: dict[str, list[int]] = {}
    for i, checkpoint in enumerate(checkpoints):
        groups.setdefault(checkpoint.group, []).append(i)
    rows: list[Row] = []
    right: dict[tuple[str, str], np.ndarray] = {}
    for group, members in groups.items():
        dense = np.stack([checkpoints[i].correct(DENSE) for i in members])
        right[group, "dense"] = dense
        rows.append({"set": "", "cell": "dense", "group": group} | _row(dense, dense, dense, videos, hops, kinds, None))
        reference = None
        for cell in cells:
            if any((i, cell.name) not in possible for i in members):
                continue
            correct = np.stack([checkpoints[i].correct(cell) for i in members])
            right[group, cell.name] = correct
            reference = correct if cell.name == REFERENCE else reference
            plan = checkpoints[members[0]].plan(cell)
            row = {"set": cell.set, "cell": cell.name, "group": group}
            rows.append(row | _row(correct, dense, reference, videos, hops, kinds, plan))
    claims = [
        {"claim": claim, "group": group, "better": a, "than": b}
        | {
            f"{part} {k}": v
            for part, keep in (("all", None), ("two-hop", hops))
            for k, v in _gap(right[group, a], right[group, b], videos, keep).items()
        }
        for claim, (a, b) in CLAIMS.items()
        for group in groups
        if (group, a) in right and (group, b) in right
    ]
    apart = [
        {"cell": cell, "group": first, "against": second}
        | {
            f"accuracy {k}": v
            for k, v in over_seeds.between(right[first, cell], right[second, cell], videos).to_dict().items()
        }
        | (_losses(right, first, second, cell, videos) if cell != "dense" else {})
        for first in groups
        for second in list(groups)[list(groups).index(first) + 1 :]
        for cell in ["dense", *(c.name for c in cells)]
        if (first, cell) in right and (second, cell) in right
    ]
    return {"rows": rows, "claims": claims, "between_groups": apart}


def _row(correct, dense, reference, videos, hops, kinds, plan: ReductionPlan | None) -> Row:
    out: Row = {"accuracy": over_seeds.accuracy(correct, videos).to_dict()}
    out["to_dense"] = None if correct is dense else over_seeds.difference(correct, dense, videos).to_dict()
    itself = reference is None or correct is reference
    out["to_reference"] = None if itself else over_seeds.difference(correct, reference, videos).to_dict()
    if hops.any():
        out["two_hop"] = over_seeds.accuracy(
            correct[:, hops], [v for v, h in zip(videos, hops, strict=True) if h]
        ).to_dict()
    out["by_type"] = {kind: float(correct[:, kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}
    if plan is not None:
        out["plan"] = plan.to_dict()
        out |= {"method": plan.method, "budget": plan.budget, "kind": plan.kind, "flops": plan.flop_ratio}
        out |= {"kept_mean": plan.retention_mean, "kept_final": plan.retention_final, "start": plan.schedule.start}
    else:
        out |= {"method": "none", "budget": 1.0, "kind": "mean", "flops": 1.0, "kept_mean": 1.0, "kept_final": 1.0}
    return out


def _gap(a: np.ndarray, b: np.ndarray, videos: Sequence[str], keep: np.ndarray | None) -> Row:
    if keep is not None:
        videos = [v for v, k in zip(videos, keep, strict=True) if k]
        a, b = a[:, keep], b[:, keep]
    return over_seeds.difference(a, b, videos).to_dict() if len(videos) else {}


def _losses(right, first: str, second: str, cell: str, videos) -> Row:
    """Difference of two groups' changes from dense to a cell: negative where the first degrades more."""
    a, b = (right[g, cell].astype(float) - right[g, "dense"] for g in (first, second))
    return {f"loss to dense {k}": v for k, v in over_seeds.between(a, b, videos).to_dict().items()}


def shown(value: Row | None, sign: bool = False) -> str:
    """`97.1 [96.0, 98.2]` in percent; the interval is over seeds where there are several that differ, else over videos."""
    if not value:
        return ""
    form = "+.1f" if sign else ".1f"
    interval = value["ci95_seeds"] or value["ci95_videos"]
    ends = "" if interval is None else " [" + ", ".join(f"{100 * v:{form}}" for v in interval) + "]"
    return f"{100 * value['mean']:{form}}{ends}"


def verdict(value: Row) -> str:
    """What the intervals say of "the first is better": both of them, over seeds and over videos, have to leave out zero."""
    found = [interval for interval in (value["ci95_seeds"], value["ci95_videos"]) if interval is not None]
    if not found:
        return "one cluster, no interval"
    if all(low > 0 for low, _ in found):
        return "for"
    return "against" if all(high < 0 for _, high in found) else "undecided"


def report(results: Row) -> str:
    """ablation.md."""
    meta, rows = results["metadata"], results["rows"]
    groups = {
        g: [m for m in meta["models"] if m["group"] == g] for g in dict.fromkeys(m["group"] for m in meta["models"])
    }
    names = "; ".join(f"{g}: {', '.join(m['name'] for m in ms)}" for g, ms in groups.items())
    parts = [
        f"# Ablation on the embedded benchmark, {meta['questions']} questions on {meta['videos']} {meta['split']} videos",
        f"`{meta['command']}`\n\nCheckpoints: {names}. Accuracies and differences in points; 95% intervals in brackets, Student's "
        "over training seeds where a group has several that differ, else clustered by video. All cells answer the same questions.",
    ]
    for name in dict.fromkeys(r["set"] for r in rows if r["set"] != "reference"):
        chosen = [r for r in rows if r["set"] == name or (name and r["cell"] in ("dense", REFERENCE))]
        if not name:
            chosen = [r for r in rows if r["cell"] in ("dense", REFERENCE)]
        table = [
            {
                "cell": r["cell"],
                "group": r["group"],
                "accuracy %": shown(r["accuracy"]),
                "two-hop %": shown(r.get("two_hop")),
                "to dense": "" if r["cell"] == "dense" else shown(r["to_dense"], True),
                "to reference": "" if r["cell"] in ("dense", REFERENCE) else shown(r["to_reference"], True),
                "FLOPs / dense": r["flops"],
                "kept % mean / last": f"{100 * r['kept_mean']:.1f} / {100 * r['kept_final']:.1f}",
            }
            for r in chosen
        ]
        parts.append(
            f"## {name or 'reference'}\n\n{SETS[name][1] + chr(10) + chr(10) if name in SETS else ''}{markdown(table)}"
        )
    if results["claims"]:
        table = [
            {
                "claim": c["claim"],
                "group": c["group"],
                "all questions": shown(_part(c, "all"), True),
                "two-hop": shown(_part(c, "two-hop"), True),
                "says": verdict(_part(c, "all")),
            }
            for c in results["claims"]
        ]
        words = "`for` and `against` where the intervals over seeds and over videos (in the JSON) both leave out zero."
        parts.append(f"## Claims: differences on the same questions and seeds\n\n{words}\n\n{markdown(table)}")
    if results["between_groups"]:
        table = [
            {
                "cell": c["cell"],
                "group": f"{c['group']} - {c['against']}",
                "accuracy": shown(_part(c, "accuracy"), True),
                "change from dense": shown(_part(c, "loss to dense"), True),
            }
            for c in results["between_groups"]
        ]
        words = "Differences between groups (Welch over seeds). Change from dense: positive where the first group loses less."
        parts.append(f"## Between groups\n\n{words}\n\n{markdown(table)}")
    if results["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {line}" for line in results["notes"]))
    return "\n\n".join(parts) + "\n"


def _part(row: Row, name: str) -> Row:
    return {k.removeprefix(name + " "): v for k, v in row.items() if k.startswith(name + " ")}


def _bar(value: Row) -> tuple[float, float, float]:
    """(mean, below, above) in percent, for error bars."""
    interval = value["ci95_seeds"] or value["ci95_videos"] or [value["mean"]] * 2
    mean = value["mean"]
    return 100 * mean, 100 * max(0.0, mean - interval[0]), 100 * max(0.0, interval[1] - mean)


def pictures(results: Row) -> dict[str, Any]:
    """Bars of every set but the budgets, and the curves of those."""
    rows, out = results["rows"], {}
    groups = list(dict.fromkeys(r["group"] for r in rows))
    sets = [s for s in dict.fromkeys(r["set"] for r in rows) if s not in ("", "reference", "budgets")]
    if sets:
        most = max(len({r["cell"] for r in rows if r["set"] == s}) for s in sets) + 2
        fig, panels = figure(1, len(sets), width=9, height=0.9 + 0.16 * most * (1 + len(groups)))
        for panel, name in zip(panels[:, 0], sets, strict=True):
            chosen = [r for r in rows if r["set"] == name or r["cell"] in ("dense", REFERENCE)]
            labels = list(dict.fromkeys(r["cell"] for r in chosen))
            for g, group in enumerate(groups):
                own = [r for r in chosen if r["group"] == group]
                means, below, above = zip(*(_bar(r["accuracy"]) for r in own), strict=True)
                heights = [labels.index(r["cell"]) + 0.8 * (g + 0.5) / len(groups) - 0.4 for r in own]
                panel.barh(
                    heights,
                    means,
                    0.8 / len(groups),
                    xerr=[below, above],
                    color=COLOURS[g % 10],
                    label=group,
                    capsize=2,
                )
            panel.set_yticks(range(len(labels)), labels, fontsize=8)
            panel.invert_yaxis()
            panel.set(title=name, xlabel="accuracy, % (95% interval)")
            panel.legend(fontsize=7, frameon=False)
        out["ablation.png"] = fig
    curves = [r for r in rows if r["set"] in ("budgets", "reference") or r["cell"] == "dense"]
    if any(r["set"] == "budgets" for r in curves):
        fig, panels = figure(len(groups), 1, width=5.6, height=4.2)
        for panel, group in zip(panels[0], groups, strict=True):
            own = [r for r in curves if r["group"] == group and r["cell"] != "dense"]
            for m, method in enumerate(dict.fromkeys(r["method"] for r in own)):
                points = sorted((r for r in own if r["method"] == method), key=lambda r: r["flops"])
                means, below, above = zip(*(_bar(r["accuracy"]) for r in points), strict=True)
                x = [100 * r["flops"] for r in points]
                panel.errorbar(
                    x, means, [below, above], label=method, color=COLOURS[m], marker="o", capsize=2, linewidth=1
                )
            dense = next(r for r in curves if r["group"] == group and r["cell"] == "dense")
            panel.axhline(100 * dense["accuracy"]["mean"], color="#999999", linewidth=0.8, label="dense")
            panel.set(title=group, xlabel="predicted FLOPs, % of dense", ylabel="accuracy, % (95% interval)")
            panel.legend(fontsize=8, frameon=False)
        out["budgets.png"] = fig
    return out
