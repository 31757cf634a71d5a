"""SparseVLM (arXiv 2410.04417): the question's attention, of those words alone that the picture is about."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from hybridvlm.config import Schedule, ScoreOptions
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import schedules, scores
from hybridvlm.reduction.methods import QUERIES, Aux, PlanView, _register
from hybridvlm.reduction.rivals.oneshot import nearest_attention

DEPTHS = (2 / 32, 6 / 32, 15 / 32)
KEPT = (300 / 576, 200 / 576, 110 / 576)  # the released list called "192", after each of the three
RATER = "sparsevlm_rater"


def released_staircase(schedule: Schedule, layers: int) -> schedules.Curve:
    """The released shares, all raised to one power that the budget decides (p = 1/2: as they are)."""
    return lambda layer, ordinal, p: KEPT[min(ordinal, len(KEPT)) - 1] ** ((1.0 - p) / p if p > 0 else 1e9)


def raters(x: jax.Array, is_visual: jax.Array, is_text: jax.Array, most: int) -> jax.Array:
    """Words that the picture is about: x [L,D], is_visual and is_text [L] bool, at most `most` of text -> [L] bool.

    Every visual token spreads a softmax of its products with the words; a word that gets more than the mean rates.
    """
    length = len(is_text)
    # the words alone: products of all tokens with all would be [L,L]
    (at,) = jnp.nonzero(is_text, size=min(most, length), fill_value=length)
    word = at < length
    x = x.astype(jnp.float32)
    products = x @ jnp.take(x, at, axis=0, mode="fill", fill_value=0).T
    spread = jax.nn.softmax(jnp.where(word[None], products, -jnp.inf), axis=-1)
    weight = jnp.where(word[None] & is_visual[:, None], spread, 0.0).sum(0) / jnp.maximum(is_visual.sum(), 1)
    rates = word & (weight > weight.sum() / jnp.maximum(word.sum(), 1))
    return jnp.zeros(length, bool).at[at].set(rates, mode="drop")


def prepare(tokens: Tokens, plan: PlanView, segments: int) -> dict[str, jax.Array]:
    """Which question tokens rate, by the embeddings that enter layer 0; all of them where none stands out."""
    rates = jnp.zeros(tokens.segment.shape, bool)
    for segment in range(1, segments + 1):
        mine = tokens.segment == segment
        found = jax.vmap(raters, in_axes=(0, 0, 0, None))(
            tokens.x, mine & tokens.visual, mine & tokens.query, plan.text_tokens
        )
        rates |= jnp.where(found.any(-1, keepdims=True), found, mine & tokens.query)
    return {RATER: rates}


@_register(
    "sparsevlm",
    "decoder",
    reads=QUERIES,
    score=ScoreOptions(),
    prepare=prepare,
    sites=nearest_attention(*DEPTHS),
    curve=released_staircase,
    where="the * nearest to 2, 6 and 15 of 32 layers",
)
def sparsevlm(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """three drops, by the attention of those question words that the picture is about

    The released v1.5 with its static lists, as one curve that is solved to the budget. Left out: recycling (dropped
    tokens clustered and appended behind), the paper's adaptive count, and of v2 its correction for rotary
    embeddings and its fixed choice of heads. The text is the question; scores are taken after a layer, not entering
    it. Where two of the sites fall on one layer there are two.
    """
    assert isinstance(aux, AttentionAux)  # its sites are attention layers
    rate = jnp.take_along_axis(tokens.extra[RATER], aux.q_index, axis=1)
    rating = dataclasses.replace(aux, q_mask=aux.q_mask & rate)
    return scores.attention_score(rating, tokens)
