"""The checkpoints of an ablation, with their answers so far."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hybridvlm.analyze.cells import Cell, CellPlanner
from hybridvlm.analyze.common import base_reduction, load_embedded, short
from hybridvlm.config import Reduction
from hybridvlm.eval.deal import weights_fingerprint
from hybridvlm.eval.results import SampleStore
from hybridvlm.eval.runner import Runner
from hybridvlm.eval.tasks import TaskOptions, build_task
from hybridvlm.eval.variants import Variant
from hybridvlm.inference.model import Model
from hybridvlm.options import InputError, override, split
from hybridvlm.reduction import ReductionPlan


class NamedModel(NamedTuple):
    """A model by its name, and the group that it is one seed of."""

    group: str
    name: str
    model: Model


@dataclasses.dataclass
class Checkpoint:
    """One set of weights with its answers. Those of one configuration share compiled programs."""

    group: str
    name: str
    model: Model
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
        runner = self.runner
        stored = ((runner.store.get(runner.key(cell, sample)), sample) for sample in runner.task.samples)
        return np.array([runner.task.judged(record, sample)["correct"] for record, sample in stored])


def parse_models(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(group, checkpoint) pairs of "GROUP=A,B" and "A,B" (each its own group); InputError for a name twice."""
    pairs = []
    for text in texts:
        group, equals, rest = text.partition("=")
        names = split(rest if equals else text)
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


def load_models(named: Sequence[tuple[str, str]]) -> list[NamedModel]:
    """The models of (group, name) pairs."""
    return [NamedModel(group, name, load_embedded(name)) for group, name in named]


def open_checkpoints(
    options: argparse.Namespace,
    models: Sequence[NamedModel],
    cells: Sequence[Cell],
    folder: pathlib.Path,
    task: str = "needle",
) -> list[Checkpoint]:
    """The models, to be asked a task's questions under `cells`, with their answers so far in `folder`."""
    folder.mkdir(exist_ok=True)
    shared: dict[str, tuple[Model, CellPlanner]] = {}
    stores: dict[str, SampleStore] = {}
    out = []
    for group, name, model in models:
        # answers are told apart by weights, not by names
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, name=""))
        kind = repr((model.config, model.buckets, model.style, model.family.NAME))
        first, planner = shared.setdefault(kind, (model, CellPlanner(model, cells)))
        own = dataclasses.replace(model, programs=first.programs)
        weights = weights_fingerprint(name, model.params)
        store = stores.setdefault(weights, SampleStore(folder / f"{weights}.jsonl"))
        asked = build_task(task, TaskOptions(model.config, split=options.split, limit=options.limit))
        runner = Runner(own, asked, [], planner, store, batch_size=options.batch_size, weights=weights)
        out.append(Checkpoint(group, name, own, runner, planner))
    return out
