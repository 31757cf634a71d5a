"""From options to a finished evaluation: checks everything first, then runs, then writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from hybridvlm.config import Reduction, to_dict
from hybridvlm.console import print_lines, progress
from hybridvlm.distributed import agree, gather, here
from hybridvlm.estimates import MeshSizes, mesh_option
from hybridvlm.eval import decoding, lmms_eval, published, report, statistics
from hybridvlm.eval.deal import weights_fingerprint
from hybridvlm.eval.layouts import Asking
from hybridvlm.eval.results import SampleStore, build_row, compare, versions, write_atomic
from hybridvlm.eval.runner import Runner
from hybridvlm.eval.sizes import asked_sizes
from hybridvlm.eval.tasks import Decoding, Sample, Task, TaskOptions, load_tasks
from hybridvlm.eval.variants import DENSE, Match, Planner, Variant, expand
from hybridvlm.inference.model import Model, load
from hybridvlm.inference.thinking import switch, think_budget
from hybridvlm.models.prompt import allow_special_tokens
from hybridvlm.options import THINKING, InputError, override, split
from hybridvlm.parallel.mesh import spans_processes
from hybridvlm.reduction import BudgetError
from hybridvlm.reduction.cost import Cost
from hybridvlm.reduction.methods import no_first_drop, takes_first_drop
from hybridvlm.storage import as_path, make_folder
from hybridvlm.tokenizers.text import check_tokenizer
from hybridvlm.video import most_frames


def base_reduction(options: argparse.Namespace, own: Reduction | None) -> Reduction:
    """What all variants share: the checkpoint's own schedule, score options and kind of budget, unless told."""
    own = own or Reduction()
    schedule = override(own.schedule, options.schedule, "--schedule")
    if options.first_drop is not None:
        schedule = dataclasses.replace(schedule, start=options.first_drop)
    return dataclasses.replace(
        own,
        method="none",
        budget=1.0,
        kind=options.kind or own.kind,
        schedule=schedule,
        score=override(own.score, options.score, "--score"),
        seed=options.seed,
        drop_text=options.drop_text or own.drop_text,
    )


def dense_costs(runner: Runner) -> dict[str, Cost]:
    """What a dense pass costs, of every sample by its id, as the plans of the reduced variants have it; {} without any."""
    for variant in runner.variants:
        if variant != DENSE:
            return {id: plan.dense_cost for id, plan in runner.plans(variant).items() if plan is not None}
    return {}


@dataclasses.dataclass(frozen=True)
class Checked:
    """Options that have proved sound, and what was loaded for them."""

    options: argparse.Namespace
    model: Model
    tasks: Sequence[Task]
    variants: Sequence[Variant]
    planner: Planner
    folder: Any
    decoding: Decoding


def prepare(options: argparse.Namespace) -> Checked:
    """Check options, model, tasks and videos; ValueError or OSError, in one line each, for what cannot run."""
    methods, budgets = split(options.methods), split(options.budgets)
    try:
        shares = [float(budget) for budget in budgets]
    except ValueError:
        raise InputError(f"--budgets takes numbers in (0, 1], got {options.budgets!r}") from None
    if not methods or not shares:
        raise InputError("--methods and --budgets need at least one entry each")
    for number, flag, least in ((options.limit or 0, "--limit", 0), (options.batch_size, "--batch-size", 1)):
        if number < least:
            raise InputError(f"{flag} must be at least {least}, got {number}")
    if options.frames is not None and options.frames < 1:
        raise InputError(f"--frames must be at least 1, got {options.frames}")
    variants = expand(methods, shares)
    if options.match is not None and options.match_flops is not None:
        raise InputError("--match-flops METHOD is --match flops:METHOD; give one of them")
    named = options.match if options.match_flops is None else f"flops:{options.match_flops}"
    match = None if named is None else Match.read(named)
    reduced = [method for method in methods if method != "none"]
    if options.first_drop is not None and reduced and not any(map(takes_first_drop, reduced)):
        raise InputError(f"--first-drop {options.first_drop}: {'; '.join(map(no_first_drop, reduced))}; leave it out")
    if options.compare is not None and options.compare not in methods:
        raise InputError(f"--compare {options.compare!r} is not among --methods {options.methods}")

    mesh = mesh_option(options.mesh, options.model, across=True, **asked_sizes(options))
    model = load(options.model, mesh=mesh, dtype=options.dtype)
    model = dataclasses.replace(model, buckets=override(model.buckets, options.buckets, "--buckets"))
    base = base_reduction(options, model.reduction)
    check_tokenizer(model)
    if options.allow_special_tokens:
        allow_special_tokens(model.tokenizer)
    switch(model, THINKING[options.thinking])
    think_budget(model, options.think_tokens)
    if options.system and not hasattr(model.tokenizer, "chat"):
        raise InputError(f"{model.name} knows no conversation; leave --system out")
    tasks, decoded = _tasks(options, model)
    default = pathlib.Path("results") / f"{model.name}-{'+'.join(task.name for task in tasks)}"
    home = as_path(options.output or default)
    if home.exists() and not home.is_dir():
        raise InputError(f"--output {home} is a file; give a folder")
    return Checked(options, model, tasks, variants, Planner(model, base, match), home, decoded)


def _tasks(options: argparse.Namespace, model: Model) -> tuple[list[Task], Decoding]:
    if model.config.vision is None:
        raise InputError(f"{model.name} reads text alone and cannot be asked about videos")
    most = most_frames(model.config, model.buckets)
    if options.frames is not None and options.frames > most:
        raise InputError(
            f"--frames {options.frames} is over the most that {model.name} can be shown, {most} (frame buckets "
            f"{model.buckets.frames}, its table of times has {model.config.vision.max_frames or 'no'} rows)"
        )
    settings = TaskOptions(
        model.config, options.frames, model.buckets, options.split, prompt=options.prompt, sampling=options.sampling,
        decoding=decoding.build(options),
    )  # fmt: skip
    names = split(options.tasks)
    if not names:
        raise InputError("--tasks needs at least one task")
    load_tasks(options.task_module)
    published.check(options, names)
    tasks = [task for name in names for task in published.build(name, settings, options)]
    published.refuse_idle(options, tasks)
    decoding.refuse_idle(options, tasks)
    twice = {task.name for task in tasks if sum(t.name == task.name for t in tasks) > 1}
    if twice:
        raise InputError(f"two tasks are called {sorted(twice)[0]!r}; rename one file or run them apart")
    problems = [line for task in tasks for line in task.check()]
    if problems:
        raise InputError("\n".join(problems))
    return tasks, settings.decoding


def _together(count: int, model: Model) -> str:
    """What several processes do, for people."""
    if not spans_processes(model.mesh):
        return f"each of {count} processes runs the model on its own devices and answers whole videos"
    assert model.mesh is not None
    sizes = MeshSizes.of(model.mesh)
    return f"{count} processes run one model over the devices of all of them (mesh {sizes}) and answer every batch together"


class Evaluation:
    """One call of the command, once its input has proved sound and its folder is held.

    ValueError where no method but dense can meet its budget, or the folder holds what is no answer of this library.
    """

    def __init__(self, checked: Checked, command: str):
        self.options, self.command, self.model, self.tasks = checked.options, command, checked.model, checked.tasks
        self.planner, self.folder, self.notes = checked.planner, checked.folder, list[str]()
        self.decoding = checked.decoding
        self.unread: list[str] = []  # a line for each task of which no video could be read, once it has run
        options, model, tasks = checked.options, checked.model, checked.tasks
        self.runners: list[Runner] = []
        self.process = here()
        writes = self.process.first or not spans_processes(self.model.mesh)
        self.store = SampleStore(self.folder / "samples.jsonl", self.process, writes=writes)
        if self.process.first and self.process.count > 1:
            print(_together(self.process.count, self.model), file=sys.stderr)
        asking = Asking(options.system, THINKING[options.thinking], options.think_tokens)
        self.weights = weights_fingerprint(options.model, model.params)
        for task in tasks:
            runner = Runner(
                model, task, [], self.planner, self.store,
                batch_size=options.batch_size, weights=self.weights, dtype=options.dtype, asking=asking,
            )  # fmt: skip
            if not task.dense_only:
                runner.variants += self._possible(runner, checked.variants)
            self.runners.append(runner)
        if options.first_drop is not None:
            idle = dict.fromkeys(v.method for v in checked.variants if v != DENSE and not takes_first_drop(v.method))
            self._note(
                *(f"--first-drop {options.first_drop} changes nothing for {m}: {no_first_drop(m)}" for m in idle)
            )

    def _possible(self, runner: Runner, variants: Sequence[Variant]) -> list[Variant]:
        """The variants whose plans can be settled; the others are named. InputError if none but dense is left."""
        good, reasons = [], []
        for variant in variants:
            if variant.method == "none":
                continue
            try:
                runner.plans(variant)
            except BudgetError as error:
                reasons.append(f"{variant.label} was left out: {error}")
                continue
            good.append(variant)
            missed = (self.planner.unmatched(variant, bucket) for bucket in sorted(set(runner.buckets.values())))
            self._note(*(line for line in missed if line))
        if reasons and not good:
            raise InputError("\n".join(reasons))
        self._note(*reasons)
        return good

    def _note(self, *lines: str) -> None:
        for line in lines:
            if line not in self.notes:
                self.notes.append(line)
                if self.process.first:
                    print(f"note: {line}", file=sys.stderr)

    def check_same(self) -> None:
        """InputError where another process has other weights, or other videos in lockstep; all of them have to call it."""
        found = [text.decode() for text in gather(self.weights.encode())]
        if len(set(found)) > 1:
            raise InputError(
                f"--model {self.options.model}: the processes have different weights under this name "
                f"({', '.join(f'process {n}: {text[:12]}' for n, text in enumerate(found))}); give all hosts the same checkpoint"
            )
        for runner in self.runners:
            if not runner.lockstep:
                continue
            asked = {sample.video: runner.key(DENSE, sample) for sample in runner.available}
            others = [json.loads(text) for text in gather(json.dumps(asked).encode())]
            for index, other in enumerate(others):
                if differs := [
                    video for video in others[0].keys() | other.keys() if others[0].get(video) != other.get(video)
                ]:
                    raise InputError(
                        f"{runner.task.name}: processes 0 and {index} have different videos under the name {min(differs)!r}, and "
                        "run one model in lockstep; give all hosts the same files"
                    )

    def run(self) -> None:
        """Answer what is missing, write results.json and the report, print the table.

        Of several processes each answers its share of the batches, and process 0 writes and prints for all. Where one fails, all
        raise; what was answered stays in their files.
        """
        self._note(*(line for task in self.tasks for line in task.about().get("notes", [])))
        self._note(*published.left_out(self.options, self.tasks))
        self._note(*(line for task in self.tasks for video in task.videos for line in task.remarks(video)))
        self.store.join()
        self.store.forget_timeouts(self.decoding.seconds)
        names = json.loads(gather(json.dumps([runner.run_id for runner in self.runners]).encode())[0])
        for runner, name in zip(self.runners, names, strict=True):
            runner.run_id = name  # processes answer as one run
        total = sum(len(runner.variants) * len(runner.task.samples) for runner in self.runners)
        missing = sum(runner.pending() for runner in self.runners)
        if missing < total and self.process.first:
            print(f"{total - missing} of {total} answers are already in {self.store.path}", file=sys.stderr)
        # what it raises leaves `together`, whose watch tells the others in the midst of their share: no collective would
        self._answer(total, missing)
        agree(None)
        self.store.join()
        self._note(*self._remarks())
        self.unread = [line for runner in self.runners if (line := self._all_unread(runner))]
        if self.process.first:
            self._write()
        agree(None)  # no part goes before all of it is written
        self.store.finish()

    def _answer(self, total: int, missing: int) -> None:
        with progress(total, "answer", done=total - missing, shown=self.process.first) as bar:
            for runner in self.runners:
                each = runner.share.count

                def count_on(count: int, label: str, task: str = runner.task.name, each: int = each) -> None:
                    bar.set_postfix_str(f"{task} {label}", refresh=False)
                    bar.update(count * each)  # the others are about as far

                runner.run(count_on)

    def _write(self) -> None:
        results = self.results()
        write_atomic(self.folder / "results.json", json.dumps(results, indent=1) + "\n")
        report.write_report(self.folder, results)
        self._write_submissions()
        if self.options.format == "lmms-eval":
            lmms_eval.write(self.folder / "lmms-eval", self.model.name, self.tasks, self._records, self.command)
        for task in self.tasks:
            rows = [row for row in results["rows"] if row["task"] == task.name]
            print(f"\n{task.name}: {rows[0]['n']} questions on {len({s.whole for s in task.samples})} videos\n")
            report.print_rows(rows)
            if task.name in results.get("tasks", {}):
                details = [extra for extra in results["details"] if extra["task"] == task.name]
                report.print_benchmark(results["tasks"][task.name], rows, details)
        print(f"\n{report.READING}")
        warnings = report.warnings_of(results["rows"], results["details"])
        print_lines((f"warning: {line}" for line in warnings), "yellow")
        print(f"\npictures: {', '.join(str(self.folder / name) for name in report.PICTURES)}")
        print(f"results:  {self.folder / 'report.md'}, results.json, samples.jsonl")

    def _records(self, task: Task, variant: Variant = DENSE) -> dict[str, dict[str, Any]]:
        """The records of a task under a variant, by sample id, as the task scores them now."""
        (runner,) = (r for r in self.runners if r.task is task)
        return {s.id: task.judged(self.store.get(runner.key(variant, s)), s) for s in task.samples}

    def _write_submissions(self) -> None:
        for runner in self.runners:
            for variant in runner.variants:
                folder = self.folder / "submissions" / runner.task.name / variant.label.replace(" at ", "-")
                for name, content in runner.task.files(self._records(runner.task, variant)).items():
                    make_folder(folder)
                    write_atomic(folder / name, content)

    def _remarks(self) -> list[str]:
        """What was said of the videos: by the decoder, and of those that could not be read."""
        lines = []
        for runner in self.runners:
            for variant in runner.variants:
                for sample in runner.available:  # of the others the task itself has told
                    record = self.store.get(runner.key(variant, sample))
                    lines += [*record.get("remarks", []), record.get("failure", "")]
            for video in runner.task.videos:
                lines += runner.task.remarks(video)
        return [line for line in dict.fromkeys(lines) if line]

    def _all_unread(self, runner: Runner) -> str:
        """What to say of a task of which no video at all could be read, so that its table holds nothing."""
        records = [self.store.get(runner.key(DENSE, sample)) for sample in runner.task.samples]
        if not all("failure" in record for record in records):
            return ""
        return f"{runner.task.name}: no video of it could be read, no question was answered; {records[0]['failure']}"

    def results(self) -> dict[str, Any]:
        """What results.json holds."""
        rows, details, comparisons = [], [], []
        for runner in self.runners:
            own = []
            for variant in runner.variants:

                def key(which: str, sample: Sample, runner: Runner = runner, variant: Variant = variant) -> str:
                    return runner.key(variant if which == "row" else DENSE, sample)

                row, extra = build_row(
                    runner.task,
                    variant.method,
                    variant.product,
                    runner.plans(variant),
                    key,
                    self.store,
                    dense_costs(runner),
                )
                own.append((variant, row, extra))
            rows += [row for _, row, _ in own]
            details += [extra for _, _, extra in own]
            chosen = self.options.compare or "str"
            for variant, row, _ in own:
                if variant.method != chosen or variant == DENSE:
                    continue
                for other, other_row, _ in own:
                    if other in (variant, DENSE) or not (other.fixed or other.budget == variant.budget):
                        continue
                    answers = [list(self._records(runner.task, v).values()) for v in (variant, other)]
                    comparisons += compare(runner.task, row, other_row, *answers)
        found = {"rows": rows, "details": details, "comparisons": comparisons, "metadata": self._metadata()}
        tasks = {task.name: about for task in self.tasks if (about := task.about())}
        return found | ({"tasks": tasks} if tasks else {})

    def _metadata(self) -> dict[str, Any]:
        device = jax.devices()[0]
        memory = device.memory_stats() or {}
        return {
            "command": self.command,
            "model": self.model.name,
            "weights": self.weights,
            "config": to_dict(self.model.config),
            "model_reduction": None if self.model.reduction is None else to_dict(self.model.reduction),
            "reduction": to_dict(self.planner.base),
            "match": None if self.planner.match is None else str(self.planner.match),
            "buckets": to_dict(self.model.buckets),
            "dtype": self.options.dtype,
            "batch_size": self.options.batch_size,
            "frames": self.options.frames,
            "system": self.options.system,
            "thinking": self.options.thinking,
            "think_tokens": self.options.think_tokens,
            "sampling": self.options.sampling or "by task",
            "seed": self.options.seed,
            **decoding.about(self.decoding),
            "split": self.options.split,
            "limit": self.options.limit,
            "versions": versions(),
            "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
            "mesh": None if self.model.mesh is None else dict(self.model.mesh.shape),
            "processes": self.process.count,
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "device_peak_bytes": memory.get("peak_bytes_in_use"),
            # of this process, in seconds: how long it answered, and how much of that the devices waited for decoding
            "answered_s": sum(runner.seconds for runner in self.runners),
            "waited_s": sum(runner.waited for runner in self.runners),
            "encode_ms": statistics.median([ms for runner in self.runners for ms in runner.encode_ms]),
            "run": [runner.run_id for runner in self.runners],
            "notes": self.notes,
        }
