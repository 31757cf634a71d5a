"""The methods that come with the library, one function each; the first line of its docstring is its help."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.config import ATTENTION, MAMBA, MIXERS, Schedule, ScoreOptions
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import calibrated, schedules, scores
from hybridvlm.reduction import evs as before
from hybridvlm.reduction.methods import (
    FEATURES,
    LAST_QUERY,
    NEXT_ATTENTION,
    QUERIES,
    Aux,
    PlanView,
    Sites,
    _after,
    _register,
    _scheduled,
)


def _first(kind: str, start: int = 0) -> Sites:
    """The site after the first layer of `kind` from index `start` on; the schedule has no say."""
    return lambda pattern, schedule: tuple(i for i, k in enumerate(pattern[:-1]) if k == kind and i >= start)[:1]


def _attention_layers(pattern: str, schedule: Schedule) -> tuple[int, ...]:
    return tuple(i for i, kind in enumerate(pattern[:-1]) if kind == ATTENTION)


def _shallow_then_attention(pattern: str, schedule: Schedule) -> tuple[int, ...]:
    """The first mixer at an eighth of the depth, then every attention layer after it."""
    shallow = [i for i, kind in enumerate(pattern[:-1]) if kind in MIXERS and i >= len(pattern) // 8][:1]
    return (*shallow, *(i for i in _attention_layers(pattern, schedule) if shallow and i > shallow[0]))


def _by_layer(aux: Aux, tokens: Tokens, options: ScoreOptions, plan: PlanView, segments: int) -> jax.Array:
    return scores.layer_score(aux, tokens, options, segments=segments, query_rows=plan.text_tokens)


_LAST = ScoreOptions(queries="last")


_ALL = {"sites": _after(MIXERS), "curve": _scheduled, "where": "M or *"}


_ONE = {"curve": lambda schedule, layers: schedules.ratio_curve}


@_register("none", "none")
def none(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """keeps every token (the dense model)"""
    return jnp.zeros(tokens.segment.shape, jnp.float32)


@_register("str", "decoder", token_local=True, reads=QUERIES, **_ALL)
def str_all(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """progressive: after every attention and Mamba layer, by the question's attention weights or c.b"""
    return _by_layer(aux, tokens, plan.score, plan, segments)


@_register(
    "str-attention", "decoder", token_local=True, reads=QUERIES, sites=_after((ATTENTION,)), curve=_scheduled, where="*"
)
def str_attention(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """as str, but scores and drops only after attention layers"""
    return _by_layer(aux, tokens, plan.score, plan, segments)


@_register("str-mamba", "decoder", reads=QUERIES, sites=_after((MAMBA,)), curve=_scheduled, where="M")
def str_mamba(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """as str, but scores and drops only after Mamba layers"""
    return _by_layer(aux, tokens, plan.score, plan, segments)


@_register(
    "str-calibrated",
    "decoder",
    token_local=True,
    reads=QUERIES,
    sites=calibrated.weighted_sites,
    curve=calibrated.weighted_curve,
    where="M or * with a weight",
)
def str_calibrated(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """as str, but each layer drops by its weight in Schedule.layer_weights; weight 0: it is skipped"""
    return _by_layer(aux, tokens, plan.score, plan, segments)


@_register("str-lookahead", "decoder", token_local=True, reads=NEXT_ATTENTION, **_ALL)
def str_lookahead(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """as str, but Mamba layers rank by how the next attention layer would look at the tokens as they are"""
    return _by_layer(aux, tokens, plan.score, plan, segments)


@_register("random", "decoder", token_local=True, **_ALL)
def random(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """str's plan with random scores, drawn from (seed, layer, position in the prompt)"""
    return scores.random_score(tokens.index_in_segment, plan.seed, layer)


@_register("uniform", "decoder", token_local=True, **_ALL)
def uniform(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """str's plan, keeping tokens evenly spread over the video"""
    return scores.spread_score(tokens.index_in_segment)


@_register("saliency", "decoder", reads=FEATURES, **_ALL)
def saliency(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """str's plan, by distance from the mean visual feature: no question in it"""
    return scores.saliency_score(tokens, segments)


@_register(
    "fastv",
    "decoder",
    token_local=True,
    reads=LAST_QUERY,
    sites=_first(ATTENTION, 2),
    where="the first * from 2 on",
    **_ONE,
)
def fastv(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """one drop after the first attention layer from layer 2 on, by the last question token's attention"""
    return _by_layer(aux, tokens, _LAST, plan, segments)


@_register(
    "pyramiddrop",
    "decoder",
    token_local=True,
    reads=LAST_QUERY,
    sites=_attention_layers,
    curve=lambda schedule, layers: schedules.geometric_curve,
    where="*",
)
def pyramiddrop(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """geometric stages after the attention layers, by the last question token's attention"""
    return _by_layer(aux, tokens, _LAST, plan, segments)


@_register(
    "timeviper-td",
    "decoder",
    token_local=True,
    reads=LAST_QUERY,
    sites=_shallow_then_attention,
    curve=lambda schedule, layers: schedules.staircase_curve(schedule.floor),
    where="one shallow M or *, then *",
)
def timeviper_td(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """a uniform drop at an eighth of the depth, then equal steps by the last question token's attention"""
    if layer == plan.sites[0]:
        return scores.spread_score(tokens.index_in_segment)
    return _by_layer(aux, tokens, _LAST, plan, segments)


@_register("oneshot-mamba", "decoder", reads=QUERIES, sites=_first(MAMBA), where="the first M", **_ONE)
def oneshot_mamba(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """one drop after the first Mamba layer, by str's score"""
    return _by_layer(aux, tokens, plan.score, plan, segments)


@_register(
    "oneshot-attention",
    "decoder",
    token_local=True,
    reads=QUERIES,
    sites=_first(ATTENTION),
    where="the first *",
    **_ONE,
)
def oneshot_attention(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """one drop after the first attention layer, by str's score"""
    return _by_layer(aux, tokens, plan.score, plan, segments)


def _ordinal(visual: jax.Array) -> jax.Array:
    """The position of every visual token among those of its video: [B,F*m] int32, whatever the bucket."""
    batch, frames, m, _ = visual.shape
    return jnp.broadcast_to(jnp.arange(frames * m, dtype=jnp.int32), (batch, frames * m))


@_register("random-input", "input")
def random_input(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> jax.Array:
    """a random choice before layer 0"""
    return scores.random_score(_ordinal(visual), plan.seed, -1)


@_register("uniform-input", "input")
def uniform_input(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> jax.Array:
    """an evenly spread choice before layer 0"""
    return scores.spread_score(_ordinal(visual))


@_register(
    "evs",
    "input",
    reads=FEATURES,
    count=lambda frames, m, share: before.evs_keep_count(frames, m, 1.0 - share),
    floor=lambda frames, m: 1 / frames,
    keeps="the first frame whole",
)
def evs(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> jax.Array:
    """before layer 0, the tokens that changed most since the previous frame; the first frame whole"""
    return before.evs_score(visual)


@_register("avgpool", "merge", reads=FEATURES)
def avgpool(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> tuple[jax.Array, jax.Array]:
    """averages fixed blocks of frames, rows and columns before the decoder"""
    return before.average_pool(visual, frame_count, plan.pool_factors, plan.grid)
