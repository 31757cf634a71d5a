"""Shares of visual tokens as functions of depth with one free parameter, solved to a budget.

A share is a whole number of 1/4096ths. `solve` bisects the free parameter p in [0, 1] (0: as few tokens as the curve
allows, 1: all of them), rounds, and then moves single stages by single quanta until the budget is met as exactly as
whole quanta allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hybridvlm.config import Schedule
from hybridvlm.pattern import compile_weight

SHARE_ONE = 4096  # the integer share that means "all"
_LEAST = 1.0 / SHARE_ONE  # floor of the methods that have no schedule of their own

# Where many questions on a video are to come: no drop in this part of the depth, which then runs once for all of them. By predicted
# FLOPs at 25% of 128 frames it costs the 12B model's first question 2% of its speed-up, and leaves further ones a quarter of its price.
SHARED_DEPTH = 1 / 6

# curve(layer, ordinal, p): the wanted share that enters `layer`, after the `ordinal`-th position (from 1) of a drop
Curve = Callable[[int, int, float], float]
# the same for positions in depth, of which a layer is a whole one
DepthCurve = Callable[[float, int, float], float]


class BudgetError(ValueError):
    """A budget that a method cannot meet; `low` and `high` are the ends of what it can."""

    def __init__(self, message: str, low: float, high: float) -> None:
        super().__init__(message)
        self.low, self.high = low, high


def schedule_curve(schedule: Schedule, layers: int) -> Curve:
    """The curve of a Schedule over `layers` layers; x = layer / (layers - 1)."""
    if schedule.shape != "list":
        return shape_curve(schedule, layers)
    values = schedule.values
    if len(values) != layers:
        raise ValueError(f"Schedule.values must have one share per layer: expected {layers}, got {len(values)}")
    if any(not 0.0 <= v <= 1.0 for v in values) or list(values) != sorted(values, reverse=True):
        raise ValueError(f"Schedule.values must lie in [0, 1] and never rise, got {values}")
    # a list is believed: its own last value may lie under the floor
    least = min(schedule.floor, values[-1])
    return lambda layer, ordinal, p: max(least, values[layer] ** _squeeze(p))


def _squeeze(p: float) -> float:
    return (1.0 - p) / p if p > 0.0 else 1e9


def shape_curve(schedule: Schedule, layers: int) -> DepthCurve:
    """The curve of a Schedule that has a shape of its own, no list, at any position in the depth of `layers` layers."""
    floor, span = schedule.floor, max(1, layers - 1)
    if schedule.shape == "constant":
        return lambda layer, ordinal, p: floor + (1.0 - floor) * p
    if schedule.shape == "step":
        # the edge is one layer wide, so that a budget between two layers is met by the share at the edge
        return lambda layer, ordinal, p: floor + (1.0 - floor) * min(1.0, max(0.0, p * span - layer + 1.0))
    if schedule.shape == "linear":
        return lambda layer, ordinal, p: max(floor, 1.0 - layer / span * _squeeze(p))
    if schedule.shape == "cosine":
        return lambda layer, ordinal, p: (
            floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, layer / span * _squeeze(p))))
        )
    reach = 12.0 / schedule.steepness  # beyond this distance from the midpoint a share rounds to the floor or to all

    def sigmoid(layer: float, ordinal: int, p: float) -> float:
        midpoint = -reach + p * (1.0 + 2.0 * reach)
        return floor + (1.0 - floor) / (1.0 + math.exp(min(700.0, schedule.steepness * (layer / span - midpoint))))

    return sigmoid


def ratio_curve(layer: int, ordinal: int, p: float) -> float:
    """One share for everything after the drop: the methods that drop once."""
    return max(_LEAST, p)


def geometric_curve(layer: int, ordinal: int, p: float) -> float:
    """Every drop keeps the same part of what the one before left (PyramidDrop's stages)."""
    return max(_LEAST, p**ordinal)


def staircase_curve(floor: float) -> Curve:
    """Every drop takes the same part of all tokens away (TimeViper's released .8 .6 .4 .2), down to `floor`."""
    return lambda layer, ordinal, p: max(floor, 1.0 - ordinal * (1.0 - p))


def staircase(curve: Curve, p: float, sites: Sequence[int], layers: int) -> list[int]:
    """Shares entering each of `layers` layers: all at first, then what `curve` asks for after each layer in `sites`."""
    shares, level, ordinal, allowed = [], SHARE_ONE, 0, set(sites)
    for layer in range(layers):
        if layer - 1 in allowed:
            ordinal += 1
            level = min(level, max(0, math.floor(SHARE_ONE * curve(layer, ordinal, p) + 0.5)))
        shares.append(level)
    return shares


def mean_share(shares: Sequence[int]) -> float:
    """Average over layers of the share that enters them."""
    return sum(shares) / (SHARE_ONE * len(shares))


def final_share(shares: Sequence[int]) -> float:
    """The share that enters the last layer."""
    return shares[-1] / SHARE_ONE


def solve(
    curve: Curve, sites: Sequence[int], layers: int, budget: float, measure: Callable[[Sequence[int]], float]
) -> tuple[int, ...]:
    """Shares [layers] along `curve` whose `measure` is `budget`, as exactly as whole quanta per stage allow.

    Raises BudgetError, with the two ends of what can be met, where the budget lies outside.
    """
    low, high = 0.0, 1.0
    least, most = measure(staircase(curve, low, sites, layers)), measure(staircase(curve, high, sites, layers))
    if not least - 1e-9 <= budget <= most + 1e-9:
        raise BudgetError(f"budget {budget:g} lies outside [{least:.4f}, {most:.4f}]", least, most)
    for _ in range(50):
        middle = 0.5 * (low + high)
        if measure(staircase(curve, middle, sites, layers)) < budget:
            low = middle
        else:
            high = middle
    ends = [staircase(curve, p, sites, layers) for p in (low, high)]
    shares = min(ends, key=lambda s: abs(measure(s) - budget))
    floor = staircase(curve, 0.0, sites, layers)[-1]
    return tuple(_settle(shares, floor, budget, measure))


def merge_stages(shares: Sequence[int], stages: int, pattern: str = "", early: float = 0.0) -> tuple[int, ...]:
    """The drops of `shares` that stay where only `stages` lengths may be: lengths fall by about the same ratio each time.

    Each may be a quarter of that step off: of those the ones are taken between which the layers of `pattern` take least to compile
    (the first ones, without a pattern). early: by what part of a step drops come before they would, 0 to 1/2: what comes before
    the first drop is at full length, and a small budget may leave no room for it.
    """
    drops = drop_sites(shares)
    wanted = max(0, stages - 1)
    if len(drops) <= wanted:
        return drops
    if not wanted:
        return ()
    fallen = {site: math.log(SHARE_ONE / max(1, shares[site + 1])) for site in drops}
    step = fallen[drops[-1]] / wanted
    # the drops so far that end with each site, after what all before takes to compile
    best: dict[int, tuple[int, tuple[int, ...]]] = {-1: (0, ())}
    for i in range(wanted):
        goal = (i + 0.5 - early) * step
        # one drop for each goal that is still to come stays over
        free = [site for n, site in enumerate(drops) if site > min(best) and len(drops) - n >= wanted - i]
        near = [site for site in free if abs(fallen[site] - goal) <= 0.25 * step]
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        for site in near or [min(free, key=lambda site: abs(fallen[site] - goal))]:
            before = [
                (weight + _stage_weight(pattern, last + 1, site), at)
                for last, (weight, at) in best.items()
                if last < site
            ]
            if before:
                weight, at = min(before)
                found[site] = (weight, (*at, site))
        best = found
    layers = len(pattern)
    return min((weight + _stage_weight(pattern, site + 1, layers - 1), at) for site, (weight, at) in best.items())[1]


def _stage_weight(pattern: str, first: int, last: int) -> int:
    """What layers first..last take to compile, the last one, which is scored, by itself."""
    if not pattern:
        return 0
    return compile_weight(pattern, first, last) + compile_weight(pattern, last, last + 1)


def drop_sites(shares: Sequence[int]) -> tuple[int, ...]:
    """Layers after which the share falls."""
    return tuple(i for i in range(len(shares) - 1) if shares[i + 1] < shares[i])


def _settle(shares: list[int], floor: int, budget: float, measure: Callable[[Sequence[int]], float]) -> list[int]:
    """Move whole stages by single quanta, one or two at a time, while that brings the measure nearer the budget."""
    starts = [site + 1 for site in drop_sites(shares)]  # the stage at full length before the first drop stays as it is
    if not starts:
        return shares
    edges = [*starts, len(shares)]

    def moved(current: list[int], changes: dict[int, int]) -> list[int] | None:
        out = list(current)
        for stage, change in changes.items():
            for layer in range(edges[stage], edges[stage + 1]):
                out[layer] += change
        falling = all(out[start] < out[start - 1] for start in starts)  # stages neither merge nor cross
        return out if falling and out[-1] >= floor else None

    error = abs(measure(shares) - budget)
    singles = [{stage: change} for stage in range(len(starts)) for change in (1, -1)]
    pairs = [
        {a: change, b: -change} for a in range(len(starts)) for b in range(a + 1, len(starts)) for change in (1, -1)
    ]
    while error > 1e-12:
        improved = False
        for moves in (singles, pairs):
            best, best_error = None, error - 1e-12
            for move in moves:
                candidate = moved(shares, move)
                if candidate is not None and (e := abs(measure(candidate) - budget)) < best_error:
                    best, best_error = candidate, e
            if best is not None:
                shares, error, improved = best, best_error, True
                break
        if not improved:
            break
    return shares
