"""Controls of `str-lookahead`: the same plan and form of score, with one thing taken away that it is said to live on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import ATTENTION
from hybridvlm.ops.compact import gather_rows
from hybridvlm.ops.layer_aux import AttentionAux, LookaheadAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import attention_score, lookahead_score, mamba_score
from hybridvlm.reduction.methods import METHODS, NEXT_ATTENTION, Aux, PlanView, register_method

SECOND = "lookahead-second"
_WORDS = {
    SECOND: "by the next attention layer but one",
    "lookahead-previous": "by the attention layer before",
    "lookahead-random": "by random projections",
    "lookahead-question": "by another question's rows",
    "lookahead-mixed": "mean of its rank and c·b's",
}
NAMES = tuple(_WORDS)


def register() -> dict[str, str]:
    """Register the controls as methods, once: {name: what it ranks by}. They read other rows of a batch, and are for analyses."""
    if SECOND not in METHODS:
        for name, function in (
            (SECOND, _second),
            ("lookahead-random", _random),
            ("lookahead-question", _question),
            ("lookahead-mixed", _mixed),
        ):
            register_method(name, reads=NEXT_ATTENTION)(function)
        register_method("lookahead-previous", reads=NEXT_ATTENTION, looks=_before)(_previous)
    return dict(_WORDS)


def _before(pattern: str, layer: int, count: int) -> tuple[int, ...]:
    """The nearest attention layer before a Mamba layer."""
    passed = [i for i in range(layer) if pattern[i] == ATTENTION]
    return tuple(passed[-1:]) if pattern[layer] != ATTENTION else ()


def _own(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """As `str-lookahead` where nothing is ahead."""
    return METHODS["str"].function(layer, aux, tokens, plan, segments)


def _second(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """str-lookahead by the farthest layer of those that it looks through, alone"""
    if not isinstance(aux, LookaheadAux):
        return _own(layer, aux, tokens, plan, segments)
    return attention_score(aux.ahead[-1], tokens, plan.score)


def _previous(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """str-lookahead by the attention layer before, which has read what it asks for"""
    if not isinstance(aux, LookaheadAux):
        return _own(layer, aux, tokens, plan, segments)
    return lookahead_score(aux, tokens, plan.score)


def _random(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """str-lookahead by random queries and keys of the same tokens"""
    if not isinstance(aux, LookaheadAux):
        return _own(layer, aux, tokens, plan, segments)
    look = aux.ahead[0]
    h = tokens.x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-6)
    one, other = jax.random.split(jax.random.fold_in(jax.random.key(plan.seed), layer))

    def project(key: jax.Array, x: jax.Array, like: jax.Array) -> jax.Array:
        weight = jax.random.normal(key, (x.shape[-1], like.shape[2] * like.shape[3])) * x.shape[-1] ** -0.5
        return (x @ weight).reshape(*x.shape[:2], *like.shape[2:]).astype(like.dtype)

    q = project(one, gather_rows(h, look.q_index), look.q)
    return attention_score(dataclasses.replace(look, q=q, k=project(other, h, look.k)), tokens, plan.score)


def _question(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """str-lookahead by the question of the row before in the batch"""
    if not isinstance(aux, LookaheadAux):
        return _own(layer, aux, tokens, plan, segments)
    look = aux.ahead[0]
    rolled = {name: jnp.roll(getattr(look, name), 1, axis=0) for name in ("q", "q_mask", "q_segment", "q_index")}
    return attention_score(dataclasses.replace(look, **rolled), tokens, plan.score)


def _mixed(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """mean rank of str-lookahead's score and the Mamba layer's own"""
    if not isinstance(aux, LookaheadAux):
        return _own(layer, aux, tokens, plan, segments)
    own: Any = attention_score if isinstance(aux.own, AttentionAux) else mamba_score
    found = (lookahead_score(aux, tokens, plan.score), own(aux.own, tokens, plan.score))
    ranks = [jnp.argsort(jnp.argsort(jnp.where(tokens.visual, score, jnp.inf), axis=1), axis=1) for score in found]
    return jnp.asarray(sum(ranks), jnp.float32)
