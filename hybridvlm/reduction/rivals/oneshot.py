"""One drop at a depth of choice, by the question's attention: the analogue of FlexSelect, and what outer methods
add inside.

FlexSelect (arXiv 2506.00993) ranks by the largest attention over heads and text rows of one reference layer, in a
pass of its own; PruneVid and FlashVID drop once inside by the largest, or by the last row's mean. Here all of it is
one drop in the only pass, after the attention layer nearest to the depth: "oneshot@0.64". A mean share below (that
layer + 1) / layers is impossible, and refused.
"""

from __future__ import annotations

from typing import Any

import jax

from hybridvlm.config import ATTENTION, Schedule, ScoreOptions
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import schedules, scores
from hybridvlm.reduction.methods import LAST_QUERY, QUERIES, Aux, PlanView, Sites, _register

DEPTH = 0.1  # FastV's and DART's second or third of 28 to 32 layers
MEAN, LARGEST, LAST = ScoreOptions(), ScoreOptions(heads="max", queries="max"), ScoreOptions(queries="last")


def nearest_attention(*fractions: float) -> Sites:
    """The attention layers nearest to shares of the depth, each once; ties to the earlier, the last layer never."""

    def sites(pattern: str, schedule: Schedule) -> tuple[int, ...]:
        layers = [i for i, kind in enumerate(pattern[:-1]) if kind == ATTENTION]
        distances = [{i: abs(i - fraction * len(pattern)) for i in layers} for fraction in fractions]
        return tuple(sorted({min(far, key=far.__getitem__) for far in distances if far}))

    return sites


def _by_attention(aux: Aux, tokens: Tokens, options: ScoreOptions) -> jax.Array:
    assert isinstance(aux, AttentionAux)  # its sites are attention layers
    return scores.attention_score(aux, tokens, options)


_ONCE: dict[str, Any] = {
    "sites": nearest_attention(DEPTH),
    "at_depth": nearest_attention,
    "curve": lambda schedule, layers: schedules.ratio_curve,
    "where": f"the * nearest to {DEPTH:g} of the depth, or @another",
    "token_local": True,
}


@_register("oneshot", "decoder", reads=QUERIES, score=MEAN, **_ONCE)
def oneshot(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """one drop at a depth (oneshot@0.64), by the question's mean attention"""
    return _by_attention(aux, tokens, MEAN)


@_register("oneshot-max", "decoder", reads=QUERIES, score=LARGEST, **_ONCE)
def oneshot_max(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """one drop at a depth, by the question's largest attention over heads and rows (FlexSelect)"""
    return _by_attention(aux, tokens, LARGEST)


@_register("oneshot-last", "decoder", reads=LAST_QUERY, score=LAST, **_ONCE)
def oneshot_last(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """one drop at a depth, by the last question token's mean attention (FastV's score anywhere)"""
    return _by_attention(aux, tokens, LAST)
