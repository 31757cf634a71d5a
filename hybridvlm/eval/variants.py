"""The rows of a table: methods at budgets, and their plans for the static shapes of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hybridvlm.config import Reduction
from hybridvlm.inference.model import Model
from hybridvlm.reduction import ReductionPlan, parse_method

MATCHED = 0.02  # relative error up to which --match counts as met
# what --match makes equal: the plan's own number, and how it is called
MATCHES = {
    "mean": ("retention_mean", "mean share of visual tokens is"),
    "flops": ("flop_ratio", "predicted decoder FLOPs are"),
    "total-flops": ("total_flop_ratio", "predicted FLOPs, tower and scoring included, are"),
}


class Bucket(NamedTuple):
    """The static shape of a batch: frames and text tokens, (height, width) of the frames, and whether of videos or images."""

    frames: int
    text: int
    size: tuple[int, int] = (0, 0)
    kind: str = "video"

    def config(self, model: Model) -> Any:
        """The model's config for clips of this size."""
        vision = model.config.vision
        if vision is None or self.size in ((0, 0), tuple(vision.image_size)):
            return model.config
        return dataclasses.replace(model.config, vision=dataclasses.replace(vision, image_size=self.size))


class Match(NamedTuple):
    """What every method is solved to: a number of `MATCHES`, as the plan of `method` at the same nominal budget has it."""

    kind: str
    method: str

    @classmethod
    def read(cls, text: str) -> Match:
        """KIND or KIND:METHOD (default: str). ValueError for another kind, an unknown method, or "none"."""
        kind, _, method = text.partition(":")
        if kind not in MATCHES:
            raise ValueError(f"--match takes {', '.join(MATCHES)}, or one of them and :METHOD, got {text!r}")
        method = method or "str"
        if len(expand([method], [1.0])) == 1:
            raise ValueError("--match takes a method that drops tokens, got 'none'")
        return cls(kind, method)

    def __str__(self) -> str:
        return f"{self.kind}:{self.method}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: a method and its nominal budget; `fixed` where the method itself says every rate."""

    method: str
    budget: float
    fixed: bool = False

    @property
    def product(self) -> float:
        """The budget of all parts together: what `evs+str` at 0.5 leaves is 0.25."""
        if self.method == "none" or self.fixed:
            return self.budget
        return float(np.prod([self.budget if rate is None else rate for _, rate in parse_method(self.method)]))

    @property
    def label(self) -> str:
        return self.method if self.fixed or self.method == "none" else f"{self.method} at {self.budget:g}"


DENSE = Variant("none", 1.0)


def expand(methods: Sequence[str], budgets: Sequence[float]) -> list[Variant]:
    """Methods x budgets, dense first and always; a method with rates of its own (`evs:0.5+str:0.5`) makes one row.

    ValueError for an unknown method (with near names) or a budget outside (0, 1].
    """
    for budget in budgets:
        Reduction(budget=budget)
    variants = [DENSE]
    for method in methods:
        parts = parse_method(method)
        if method == "none":
            continue
        rates = [rate for _, rate in parts if rate is not None]
        if len(rates) == len(parts):
            variants.append(Variant(method, float(np.prod(rates)), fixed=True))
        else:
            variants += [Variant(method, float(budget)) for budget in budgets]
    return list(dict.fromkeys(variants))


class Planner:
    """Reductions and plans of variants, per bucket, settled once.

    base: kind, schedule, score options and seed that all variants share. match: what every other method is solved to.
    """

    def __init__(self, model: Model, base: Reduction, match: Match | None = None):
        self.model, self.base, self.match = model, base, match
        self._plans: dict[tuple[Variant, Bucket], tuple[Reduction, ReductionPlan | None]] = {}

    def __call__(self, variant: Variant, bucket: Bucket) -> tuple[Reduction, ReductionPlan | None]:
        """(reduction, plan); ValueError where the method cannot meet the budget."""
        if (variant, bucket) not in self._plans:
            reduction = dataclasses.replace(
                self.base, method=variant.method, budget=1.0 if variant.fixed else variant.budget
            )
            if (
                self.match is not None
                and self.match.method != variant.method
                and variant != DENSE
                and not variant.fixed
            ):
                _, goal = self(Variant(self.match.method, variant.budget), bucket)
                if goal is not None:
                    budget = min(1.0, getattr(goal, MATCHES[self.match.kind][0]))
                    reduction = dataclasses.replace(reduction, kind=self.match.kind, budget=budget)
            config = bucket.config(self.model)
            self._plans[variant, bucket] = (
                reduction,
                self.model.plan(reduction, bucket.frames, bucket.text, config=config),
            )
        return self._plans[variant, bucket]

    def unmatched(self, variant: Variant, bucket: Bucket) -> str | None:
        """What a reader must know where a plan misses what it was to match."""
        if self.match is None or self.match.method == variant.method or variant == DENSE:
            return None
        if variant.fixed:
            return f"{variant.label} was not matched: its rates are written out"
        field, words = MATCHES[self.match.kind]
        _, plan = self(variant, bucket)
        _, goal = self(Variant(self.match.method, variant.budget), bucket)
        if plan is None or goal is None or abs(getattr(plan, field) / getattr(goal, field) - 1) <= MATCHED:
            return None
        found = f"{words} {getattr(plan, field):.3f} of dense where {self.match.method} has {getattr(goal, field):.3f}"
        return f"{variant.label} could not be matched: its {found}"
