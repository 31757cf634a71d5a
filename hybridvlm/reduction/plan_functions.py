"""What a plan has the model compute, as functions of arrays: scores after a layer, what is kept or merged before the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from hybridvlm.config import ScoreOptions
from hybridvlm.ops.fold import Selection
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction.methods import Aux, Method, PlanView, ScoreFn, get_method
from hybridvlm.reduction.scores import layer_score


@dataclasses.dataclass(frozen=True)
class PlanScore:
    """The function (layer, aux, tokens) -> score [B,L] fp32 by which a plan ranks visual tokens after a layer; see `score_fn`."""

    plan: PlanView
    segments: int = 1

    @property
    def method(self) -> Method:
        """What it ranks by, and what that reads."""
        return get_method(self.plan.decoder_method)

    def ahead(self, layer: int) -> tuple[int, ...]:
        """The attention layers to come that the aux after `layer` has to tell of."""
        return self.method.ahead(self.plan.pattern, layer, self.plan.score)

    def __call__(self, layer: int, aux: Aux, tokens: Tokens) -> jax.Array | Selection:
        return self.method.function(layer, aux, tokens, self.plan, self.segments)


def score_fn(plan: PlanView, *, segments: int = 1) -> PlanScore:
    """The function (layer, aux, tokens) -> score [B,L] fp32 by which `plan` ranks visual tokens after a layer.

    `tokens` are the layer's output; `segments` is the largest segment number in a row (1 unless examples are packed).
    """
    get_method(plan.decoder_method)
    return PlanScore(plan, segments)


def layer_score_fn(options: ScoreOptions = ScoreOptions(), segments: int = 1, text: int | None = None) -> ScoreFn:  # noqa: B008, frozen
    """Every mixer layer's own score without a plan: what "str" ranks by.

    Args:
        options: of the score.
        segments: the largest segment number in a row.
        text: most text tokens of a row (default: all of its tokens may be text).
    """
    return lambda layer, aux, tokens: layer_score(aux, tokens, options, segments=segments, query_rows=text)


def input_selection(plan: PlanView) -> Callable[..., Selection]:
    """What a plan with `drops_input` keeps: the function (visual [B,F,m,D], frame_count [B], attention) -> Selection of F*m tokens.

    attention [B,F,m] fp32: the tower's, for methods that need it (`Method.needs`); of one that chose by pixels, what it chose, 1.
    """
    method = get_method(plan.input_method)
    if method.phase != "input":
        raise ValueError(f"plan of {plan.method!r} drops nothing before layer 0; ask plan.drops_input first")

    def select(visual: jax.Array, frame_count: jax.Array, attention: jax.Array | None = None) -> Selection:
        if "pixels" in method.needs:
            assert attention is not None  # as the family has checked
            chosen = attention.reshape(attention.shape[0], -1)
        elif "attention" not in method.needs:
            chosen = method.function(visual, frame_count, plan)
        elif attention is None:
            raise ValueError(f"{method.name} ranks by the tower's attention; encode the frames with attention=True")
        else:
            chosen = method.function(visual, frame_count, plan, attention)
        return chosen if isinstance(chosen, Selection) else Selection(chosen)

    return select


def merge_fn(plan: PlanView) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """For a plan with pool_factors: the function (visual [B,F,m,D], frame_count [B]) -> the same two after merging."""
    method = get_method(plan.input_method)
    if method.phase != "merge":
        raise ValueError(f"plan of {plan.method!r} merges nothing; ask plan.pool_factors != (1, 1, 1) first")
    return lambda visual, frame_count: method.function(visual, frame_count, plan)
