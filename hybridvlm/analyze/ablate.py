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
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np

from hybridvlm.analyze.ablate_checkpoints import Checkpoint, load_models, open_checkpoints, parse_models, reference
from hybridvlm.analyze.ablate_report import pictures, report, summarise
from hybridvlm.analyze.cells import SETS, Cell, cells_of
from hybridvlm.analyze.common import Row, markdown, output_folder, write_figure, write_json
from hybridvlm.config import to_dict
from hybridvlm.console import print_markdown, progress
from hybridvlm.eval.results import versions, write_atomic
from hybridvlm.eval.variants import DENSE, Variant
from hybridvlm.files import folder_lock
from hybridvlm.options import InputError, split
from hybridvlm.reduction import BudgetError


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
    models = load_models(parse_models(options.models))
    base = reference(options, [named.model.reduction for named in models])
    cells = cells_of(split(options.sets), base, options.cell)
    checkpoints = open_checkpoints(options, models, cells, folder / "answers")
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
        f"about {building / 60:.0f} min for the compiler ({len(programs)} programs; too little where of these "
        "an earlier run has kept that of dense alone); the answers found are kept"
    )


def _answer(checkpoints, work) -> None:
    with progress(sum(n for _, _, n in work), "answer") as bar:
        for i, cell, _ in work:
            checkpoint = checkpoints[i]
            bar.set_postfix_str(f"{checkpoint.name} {getattr(cell, 'name', 'dense')}", refresh=True)
            checkpoint.run(cell, lambda count, _label: bar.update(count))
