"""The cells of an ablation: named reductions that differ from one reference in one thing at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from hybridvlm.analyze import controls
from hybridvlm.config import Reduction
from hybridvlm.eval.variants import MATCHED, MATCHES, Bucket, Planner, Variant
from hybridvlm.inference.model import Model
from hybridvlm.options import InputError, override
from hybridvlm.reduction import BudgetError, ReductionPlan, get_method, parse_method

REFERENCE = "str"
BUDGETS = (0.10, 0.125, 0.25, 0.35, 0.50, 0.75)
NEAR = 1.15  # a method that cannot meet a budget runs at the least it can, if that is at most so much more


_DENSE = Reduction()


@dataclasses.dataclass(frozen=True)
class Cell(Variant):
    """One reduction under a name. match: its predicted FLOPs are solved to those that this reduction has, of the kind `match_kind`.

    lower: where the budget cannot be met because drops may start too late, they start as early as it takes.
    """

    name: str = ""
    reduction: Reduction = _DENSE
    match: Reduction | None = None
    lower: bool = False
    set: str = ""
    match_kind: str = "flops"


def cell(
    set_: str,
    name: str,
    reduction: Reduction,
    match: Reduction | None = None,
    lower: bool = False,
    match_kind: str = "flops",
) -> Cell:
    """A Cell, with the fields of a Variant that follow from its reduction."""
    fixed = all(rate is not None for _, rate in parse_method(reduction.method))
    return Cell(reduction.method, reduction.budget, fixed, name, reduction, match, lower, set_, match_kind)


class CellPlanner(Planner):
    """Reductions and plans of `cells`, per bucket. `notes`: what a reader must know."""

    def __init__(self, model: Model, cells: Sequence[Cell]):
        # buckets of text are sized by it: all cells answer in those that have room for what any of them drops
        drop_text = next((c.reduction.drop_text for c in cells if c.reduction.drop_text != "none"), "none")
        super().__init__(model, dataclasses.replace(_DENSE, drop_text=drop_text))
        self.notes: list[str] = []

    def __call__(self, variant: Variant, bucket: Bucket) -> tuple[Reduction, ReductionPlan | None]:
        """(reduction, plan); BudgetError where the cell's method cannot meet its budget."""
        if (variant, bucket) not in self._plans:
            self._plans[variant, bucket] = (
                self._settle(variant, bucket) if isinstance(variant, Cell) else (_DENSE, None)
            )
        return self._plans[variant, bucket]

    def _settle(self, cell: Cell, bucket: Bucket) -> tuple[Reduction, ReductionPlan | None]:
        reduction = cell.reduction
        if cell.match is None:
            return self._plan(cell, reduction, bucket, reduction.budget)
        field, words = MATCHES[cell.match_kind]
        goal = getattr(self._started(cell.match, bucket)[1], field)
        rate = math.prod(rate for _, rate in parse_method(reduction.method) if rate is not None)
        if goal / rate > 1:
            raise BudgetError(
                f"{reduction.method}: that its {words} {goal:.3f} of dense asks its last part for more than all",
                rate,
                1.0,
            )
        reduction = dataclasses.replace(reduction, kind=cell.match_kind, budget=goal / rate)
        reduction, plan = self._plan(cell, reduction, bucket, goal)
        found = getattr(plan, field)
        if abs(found / goal - 1) > MATCHED:
            self._note(f"{cell.name}: its {words} {found:.3f} of dense where {goal:.3f} was to be met")
        return reduction, plan

    def _plan(self, cell: Cell, reduction: Reduction, bucket: Bucket, goal: float) -> tuple[Reduction, ReductionPlan]:
        try:
            if cell.lower:
                reduction, plan = self._started(reduction, bucket)
                if reduction.schedule.start != cell.reduction.schedule.start:
                    self._note(f"{cell.name}: drops start after layer {reduction.schedule.start}, to meet the budget")
                return reduction, plan
            return reduction, self._made(reduction, bucket)
        except BudgetError as error:
            least = math.ceil(error.low * 1e4) / 1e4
            if not reduction.budget < least <= min(1.0, NEAR * reduction.budget):
                raise
            self._note(f"{cell.name}: cannot meet {goal:.3f}, runs at the least it can, {least:g}")
            reduction = dataclasses.replace(reduction, budget=least)
            return self._started(reduction, bucket) if cell.lower else (reduction, self._made(reduction, bucket))

    def _made(self, reduction: Reduction, bucket: Bucket) -> ReductionPlan:
        plan = self.model.plan(reduction, bucket.frames, bucket.text)
        if plan is None:
            raise BudgetError(f"{reduction.method} drops nothing, so that it is no cell; dense runs anyway", 1.0, 1.0)
        return plan

    def _started(self, reduction: Reduction, bucket: Bucket) -> tuple[Reduction, ReductionPlan]:
        """The latest start, at most the schedule's own, from which the budget can be met; its BudgetError if none is."""
        for start in range(reduction.schedule.start, -1, -1):
            tried = dataclasses.replace(reduction, schedule=dataclasses.replace(reduction.schedule, start=start))
            try:
                return tried, self._made(tried, bucket)
            except BudgetError:
                if start == 0 or not get_method(parse_method(reduction.method)[-1][0]).scheduled:
                    raise
        raise AssertionError("range is never empty")

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def _with(base: Reduction, **changes: Any) -> Reduction:
    """`base` with fields replaced, those of its schedule and score options by their own names."""
    own = {f.name for f in dataclasses.fields(Reduction)}
    schedule = {k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(base.schedule)}}
    score = {k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(base.score)}}
    rest = {k: v for k, v in changes.items() if k in own}
    return dataclasses.replace(
        base,
        schedule=dataclasses.replace(base.schedule, **schedule),
        score=dataclasses.replace(base.score, **score),
        **rest,
    )


def _layers(base: Reduction) -> list[Cell]:
    early = _with(base, start=0)
    half = _with(early, budget=0.5)
    cells = [cell("layers", "all layers, from 0", early, base)]
    for method, words in (("str-attention", "attention"), ("str-mamba", "Mamba")):
        cells.append(cell("layers", f"{words} layers only, from 0", _with(early, method=method), base))
    cells.append(cell("layers", "all layers, from 0, 50%", half))
    for method, words in (("str-attention", "attention"), ("str-mamba", "Mamba")):
        cells.append(cell("layers", f"{words} layers only, from 0, 50%", _with(half, method=method), half))
    return cells


def _schedules(base: Reduction) -> list[Cell]:
    shapes = [s for s in ("sigmoid", "linear", "cosine", "step", "constant") if s != base.schedule.shape]
    cells = [cell("schedules", f"{shape}", _with(base, shape=shape), base) for shape in shapes]
    cells.append(cell("schedules", f"{base.schedule.shape}, from 0", _with(base, start=0), base))
    cells.append(cell("schedules", f"{base.schedule.shape}, floor 5%", _with(base, floor=0.05), base))
    return cells


def _progress(base: Reduction) -> list[Cell]:
    one = ("oneshot-mamba", "oneshot-attention", "fastv", "pyramiddrop", "timeviper-td")
    return [cell("progress", method, _with(base, method=method), base) for method in one]


def _query(base: Reduction) -> list[Cell]:
    inside = [cell("query", method, _with(base, method=method)) for method in ("random", "uniform", "saliency")]
    before = [cell("query", method, _with(base, method=method), base) for method in ("random-input", "uniform-input")]
    return inside + before


def _scores(base: Reduction) -> list[Cell]:
    choices = ({"decay": True}, {"dt": True}, {"decay": True, "dt": True})
    return [cell("scores", " + ".join(f"{k} on" for k in c), _with(base, **c)) for c in choices]


def _aggregation(base: Reduction) -> list[Cell]:
    choices = (
        ("sign", "relu"),
        ("sign", "abs"),
        ("norm", "softmax"),
        ("norm", "zscore"),
        ("queries", "last"),
        ("queries", "max"),
    )
    return [cell("aggregation", f"{key} {value}", _with(base, **{key: value})) for key, value in choices]


def _budgets(base: Reduction) -> list[Cell]:
    cells = []
    for budget in BUDGETS:
        own = _with(base, budget=budget)
        for method in ("str", "random", "saliency"):
            if (method, budget) != ("str", base.budget):
                cells.append(cell("budgets", f"{method} {100 * budget:g}%", _with(own, method=method), lower=True))
        cells.append(
            cell("budgets", f"oneshot-attention {100 * budget:g}%", _with(own, method="oneshot-attention"), own)
        )
    return cells


def _composition(base: Reduction) -> list[Cell]:
    b = base.budget
    product = [
        cell("composition", "evs", _with(base, method="evs")),
        cell("composition", f"evs:0.5+str:{2 * b:g}", _with(base, method=f"evs:0.5+str:{2 * b:g}", budget=1.0)),
        cell(
            "composition",
            f"evs:0.75+str:{b / 0.75:.4g}",
            _with(base, method=f"evs:0.75+str:{b / 0.75:.4g}", budget=1.0),
        ),
    ]
    matched = [
        cell("composition", "evs, FLOPs of str", _with(base, method="evs"), base),
        cell("composition", "evs:0.5+str, FLOPs of str", _with(base, method="evs:0.5+str"), base),
        cell("composition", "evs:0.75+str, FLOPs of str", _with(base, method="evs:0.75+str"), base),
    ]
    return product + matched


def _lookahead(base: Reduction) -> list[Cell]:
    own = _with(base, method="str-lookahead")
    counts = ((2, "the next two"), (0, "all that come"))
    cells = [cell("lookahead", "str-lookahead", own)]
    cells += [cell("lookahead", f"str-lookahead, {words}", _with(own, ahead=count)) for count, words in counts]
    return cells + [
        cell("lookahead", words, _with(base, method=name, ahead=2 if name == controls.SECOND else 1))
        for name, words in controls.register().items()
    ]


SETS: dict[str, tuple[Callable[[Reduction], list[Cell]], str]] = {
    "layers": (_layers, "which layers score and drop: attention, Mamba, all; at equal FLOPs"),
    "schedules": (_schedules, "shape of the schedule, where it starts, its floor; at equal FLOPs"),
    "progress": (_progress, "one-shot and stage-wise rules against the progressive one; at equal FLOPs"),
    "query": (_query, "query-free choices inside (same plan) and before the decoder (equal FLOPs)"),
    "scores": (_scores, "decay and dt in the Mamba score"),
    "aggregation": (_aggregation, "sign, norm and reduction over query words of the Mamba score"),
    "budgets": (_budgets, f"str, random, saliency, one-shot at {', '.join(f'{100 * b:g}' for b in BUDGETS)}% mean"),
    "lookahead": (_lookahead, "scores by attention layers to come, and controls that should fall; same plan"),
    "composition": (_composition, "evs+str against either alone, at one product budget and at equal FLOPs"),
}

# claim -> (the cell that should be better, the cell it is compared with); differences are paired over questions
CLAIMS: dict[str, tuple[str, str]] = {
    "progressive beats one drop after the first attention layer": (REFERENCE, "oneshot-attention"),
    "progressive beats one drop after the first Mamba layer": (REFERENCE, "oneshot-mamba"),
    "progressive beats FastV": (REFERENCE, "fastv"),
    "late progress beats a constant share": (REFERENCE, "constant"),
    "starting after the first look-up beats starting at once": (REFERENCE, "sigmoid, from 0"),
    "decay-free beats decayed": (REFERENCE, "decay on"),
    "dt-free beats dt": (REFERENCE, "dt on"),
    "Mamba layers' scores help: all layers beat attention layers alone": (
        "all layers, from 0",
        "attention layers only, from 0",
    ),
    "the same at 50%": ("all layers, from 0, 50%", "attention layers only, from 0, 50%"),
    "attention layers' scores help: all layers beat Mamba layers alone": (
        "all layers, from 0",
        "Mamba layers only, from 0",
    ),
    "query-aware beats saliency": (REFERENCE, "saliency"),
    "query-aware beats random": (REFERENCE, "random"),
    "str beats evs at equal FLOPs": (REFERENCE, "evs, FLOPs of str"),
    "evs+str beats str at equal FLOPs": ("evs:0.5+str, FLOPs of str", REFERENCE),
    "evs+str beats evs at equal FLOPs": ("evs:0.5+str, FLOPs of str", "evs, FLOPs of str"),
    "the next attention layer's score beats the layer's own": ("str-lookahead", REFERENCE),
    "trusting calibrated layers beats plain str": ("str-calibrated", REFERENCE),
    "the same, both from layer 0": ("str-calibrated, from 0", "str, from 0"),
    "trusting calibrated layers beats attention layers alone": ("str-calibrated", "str-attention"),
}


def cells_of(sets: Sequence[str], base: Reduction, own: Sequence[str] = ()) -> list[Cell]:
    """The reference, the cells of the named sets, and `own` cells "name: key=value …"; InputError for what is not known."""
    unknown = [name for name in sets if name not in SETS]
    if unknown:
        raise InputError(f"--sets has no {unknown[0]!r}; the sets are {', '.join(SETS)}")
    cells = [cell("reference", REFERENCE, base)]
    for name in sets:
        cells += SETS[name][0](base)
    cells += [_own(text, base) for text in own]
    names = [c.name for c in cells]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(f"two cells are called {twice[0]!r}")
    return cells


def _own(text: str, base: Reduction) -> Cell:
    """A cell of one's own: `NAME: method=str budget=0.25 decay=on start=2 match=on`."""
    name, colon, rest = text.partition(":")
    if not colon or not name.strip():
        raise InputError(f"--cell takes 'NAME: key=value …', got {text!r}")
    fields: dict[str, Any] = {"method": base.method, "budget": base.budget, "kind": base.kind, "seed": base.seed}
    fields["drop_text"] = base.drop_text
    schedule, score, match = [], [], None
    for part in rest.split():
        key, _, value = part.partition("=")
        if key == "match":
            if value not in ("on", "off"):
                raise InputError(f"--cell match must be on or off, got {value!r}")
            match = base if value == "on" else None
        elif key in fields:
            try:
                fields[key] = type(fields[key])(value) if key != "budget" else float(value)
            except ValueError:
                raise InputError(f"--cell {key} must be a number, got {value!r}") from None
        elif key in {f.name for f in dataclasses.fields(base.schedule)}:
            schedule.append(part)
        else:
            score.append(part)
    changed = dataclasses.replace(
        base,
        schedule=override(base.schedule, schedule, "--cell"),
        score=override(base.score, score, "--cell"),
        **fields,
    )
    parse_method(changed.method)
    return cell("own", name.strip(), changed, match)
