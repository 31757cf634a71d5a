"""From a reduction and a bucket to a ReductionPlan: which method runs where, what each keeps, what that costs."""

from __future__ import annotations

import dataclasses
from typing import Any

from hybridvlm.config import Reduction
from hybridvlm.reduction import cost as flops
from hybridvlm.reduction import methods
from hybridvlm.reduction.frame_text import frame_text as settle_frame_text
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.reduction.schedules import SHARE_ONE, BudgetError
from hybridvlm.reduction.solver import BudgetSolver, entering_tokens, pooled_tokens, split_pair

MAX_VISUAL_TOKENS = 2**31 - 1  # of an int32, which counts tokens on the device


def make_plan(
    reduction: Reduction,
    config: flops.Counted,
    *,
    visual_tokens: int,
    text_tokens: int,
    frames: int,
    chunk_size: int | None = None,
    itemsize: int = 2,
    frame_text: int = 0,
) -> ReductionPlan:
    """The plan of a reduction for a model and a bucket.

    Args:
        reduction: method, budget and schedule.
        config: of the model, as costs are counted by it.
        visual_tokens: of the bucket.
        text_tokens: of the bucket.
        frames: that the visual tokens are of.
        chunk_size: the SSD chunk that runs (default: the config's).
        itemsize: bytes of a value in KV and convolution caches.
        frame_text: most text tokens that a frame has of its own, for `Reduction.drop_text`.

    Raises:
        ValueError: the budget cannot be met (the message says what the method can do), or no text can be dropped here.
    """
    if not 0 <= visual_tokens <= MAX_VISUAL_TOKENS:
        raise ValueError(f"make_plan: visual_tokens must lie in [0, {MAX_VISUAL_TOKENS}], got {visual_tokens}")
    pair = methods.get_method(methods.parse_method(reduction.method)[0][0]).pair
    if pair is not None and reduction.kind in ("flops", "total-flops"):
        sizes = {"visual_tokens": visual_tokens, "text_tokens": text_tokens, "frames": frames, "frame_text": frame_text}
        return _pair_by_operations(reduction, config, chunk_size=chunk_size, itemsize=itemsize, **sizes)
    outer, rate, inner, budget = _split(reduction, config.pattern)
    own_text = settle_frame_text(
        reduction.drop_text,
        reduction.method,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        frames=frames,
        size=frame_text,
        whole=methods.get_method(outer).encodes is not None,
        pools=methods.get_method(outer).phase == "merge",
    )
    fit = BudgetSolver(reduction, config, visual_tokens, text_tokens, frames, chunk_size, outer, inner, own_text)
    before = fit.before_decoder(rate)
    pools = before.pool_factors != (1, 1, 1)
    decoder_input = pooled_tokens(frames, before.grid, before.pool_factors) if pools else visual_tokens
    entering = entering_tokens(before.rule, before.share, before.rate, decoder_input, frames)
    relative, sites = fit.relative(budget, entering, rate, before.share / SHARE_ONE)
    lengths = [(entering * r + SHARE_ONE // 2) // SHARE_ONE for r in relative]
    vision = fit.vision(decoder_input / visual_tokens if pools else before.share / SHARE_ONE)
    return ReductionPlan(
        method=reduction.method,
        input_method=outer,
        decoder_method=inner,
        budget=rate * budget,
        kind=reduction.kind,
        pattern=config.pattern,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        frames=frames,
        relative=relative,
        sites=sites,
        input_rule=before.rule,
        input_share=before.share,
        input_rate=before.rate,
        pool_factors=before.pool_factors,
        grid=before.grid,
        schedule=reduction.schedule,
        score=reduction.score,
        seed=reduction.seed,
        cost=fit.cost(lengths, fit.scoring(relative, entering), vision, itemsize),
        dense_cost=fit.cost([visual_tokens] * len(config.pattern), 0, fit.vision(None), itemsize),
        drop_text=own_text.rule,
        frame_text=own_text.size,
    )


def _pair_by_operations(reduction: Reduction, config: flops.Counted, **sizes: Any) -> ReductionPlan:
    """The plan of a pair at the mean share with which it meets a budget of operations, its inner stage as published."""
    ((name, rate),) = methods.parse_method(reduction.method)
    goal = reduction.budget if rate is None else rate
    field = "flop_ratio" if reduction.kind == "flops" else "total_flop_ratio"

    def at(budget: float) -> ReductionPlan:
        return make_plan(dataclasses.replace(reduction, method=name, kind="mean", budget=budget), config, **sizes)

    low, high, best = 1 / SHARE_ONE, 1.0, at(1.0)
    if getattr(best, field) > goal:
        try:
            best = at(0.999)
        except BudgetError as error:
            high = error.high
            best = at(high)
        least = at(low)
        if not getattr(least, field) <= goal <= getattr(best, field):
            ends = getattr(least, field), getattr(best, field)
            text = f"{name} can meet {reduction.kind} budgets from {ends[0]:.4f} to {ends[1]:.4f} on these layers, or 1; got {goal:g}"
            raise BudgetError(text, *ends)
        for _ in range(14):
            tried = at(0.5 * (low + high))
            low, high = (tried.budget, high) if getattr(tried, field) < goal else (low, tried.budget)
            best = min(best, tried, key=lambda plan: abs(getattr(plan, field) - goal))
    return dataclasses.replace(best, method=reduction.method, kind=reduction.kind, budget=goal)


def _split(reduction: Reduction, pattern: str) -> tuple[str, float, str, float]:
    """(input method, its rate, decoder method, its budget); a part without a rate takes the reduction's budget."""
    parts = [
        (name, reduction.budget if rate is None else rate) for name, rate in methods.parse_method(reduction.method)
    ]
    outer, inner = ("none", 1.0), ("none", 1.0)
    for name, rate in parts:
        phase, pair = methods.get_method(name).phase, methods.get_method(name).pair
        if pair is not None:
            return split_pair(pair, name, pattern, reduction.schedule, rate, reduction.kind)
        if phase == "decoder":
            inner = (name, rate)
        elif phase != "none":
            outer = (name, rate)
    return (*outer, *inner)
