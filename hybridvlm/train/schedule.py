"""What each step of a training does: under which reduction it runs, or that it is a dense one that teaches."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal

import numpy as np

from hybridvlm.config import Reduction
from hybridvlm.reduction import ReductionPlan
from hybridvlm.train.config import ReductionMode, TrainConfig

# apart from all else that is drawn by a run's seed
_BUDGETS = 77
# In the place of a plan: a dense step that teaches.
TEACH: Final = "teach"
StepPlan = ReductionPlan | Literal["teach"] | None


def step_kind(plan: Any) -> str:
    """The name of a step under this plan: "teach", "dense", or a method and its budget."""
    return TEACH if plan == TEACH else "dense" if plan is None else f"{plan.method}:{plan.budget:g}"


def reductions(mode: ReductionMode) -> list[Reduction | None]:
    """The reductions of a run, in order; None is the dense model."""
    if mode.mode == "none":
        return [None]
    budgets = mode.budgets or (mode.reduction.budget,)
    # a method that says its own rates has budget 1 and reduces none the less
    dense = lambda budget: mode.reduction.method == "none" or (bool(mode.budgets) and budget == 1.0)  # noqa: E731
    return [None if dense(b) else dataclasses.replace(mode.reduction, budget=b) for b in budgets]


def reduction_at(config: TrainConfig, step: int) -> int:
    """Which of `reductions` step number `step` runs under."""
    mode = config.reduction
    if mode.mode == "curriculum":
        return min(step * len(mode.budgets) // config.steps, len(mode.budgets) - 1)
    if mode.mode == "random":
        return int(np.random.default_rng([config.seed, _BUDGETS, step]).integers(len(mode.budgets)))
    return 0


def teaches(config: TrainConfig, step: int) -> bool:
    """Whether a step is a dense one that teaches."""
    d = config.distill
    return step < d.teach or (d.every > 0 and (step - d.teach) % d.every == d.every - 1)
