"""UTRC (arXiv 2410.14725): in Mamba layers, tokens of little output are dropped, or merged into the most alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.config import MAMBA
from hybridvlm.ops.fold import Selection
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction.choose import ranks, unit
from hybridvlm.reduction.cluster import mean_weights
from hybridvlm.reduction.methods import FEATURES, Aux, PlanView, _after, _register, _scheduled
from hybridvlm.reduction.rivals.framefusion import GIVEN, tokens_given

DROPPED = 0.5  # of the pairs, the most alike


@_register(
    "utrc",
    "decoder",
    reads=FEATURES,
    all_heads=True,
    merges=True,
    scoring=lambda visual, kept, frames, width: 2 * visual * visual * width,
    prepare=lambda tokens, plan, segments: {GIVEN: tokens_given(tokens, segments)},
    sites=_after((MAMBA,)),
    curve=_scheduled,
    where="M",
)
def utrc(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> Selection:
    """after Mamba layers, tokens of little output are dropped or merged into the most alike

    The paper's rule, not the release's, whose match indices belong to other tokens: of visual tokens alone, by the
    residual stream as the layer leaves it, on the plan's curve.
    """
    length = tokens.length
    score = jnp.zeros(tokens.segment.shape, jnp.float32)
    into = jnp.full(tokens.segment.shape, length, jnp.int32)
    for segment in range(1, segments + 1):
        visual = tokens.visual & (tokens.segment == segment)
        keep = plan.keep(layer + 1, jnp.max(jnp.where(visual, tokens.extra[GIVEN], 0), axis=-1))
        found, ranked = jax.vmap(utrc_row)(tokens.x, visual, keep)
        score, into = jnp.where(visual, ranked, score), jnp.where(visual, found, into)
    return Selection(score, into[:, None], jax.vmap(mean_weights)(into)[:, None])


def utrc_row(
    x: jax.Array, visual: jax.Array, keep: jax.Array, importance: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(into [L] int32, L for what is dropped; score [L]) of one example in a row: x [L,D], visual [L] bool, keep of
    its tokens.

    Importance (given, or the sum of positive channels) parts the tokens: the lower half may leave, each for the
    most alike of the upper half. The most alike pairs leave, as many as are too many: the first half of them is
    dropped, the other averaged into its target. Where more have to leave than the lower half holds, the least
    important of the rest follow.
    """
    length = len(visual)
    if importance is None:
        importance = jnp.sum(jnp.maximum(x.astype(jnp.float32), 0.0), axis=-1)
    count = visual.sum()
    order = ranks(jnp.where(visual, importance, -jnp.inf))
    upper = visual & (order < count - count // 2)
    y = unit(x)

    def nearest(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        likeness = jnp.where(upper, y @ row, -jnp.inf)
        return jnp.argmax(likeness), jnp.max(likeness)

    best, likeness = jax.lax.map(nearest, y, batch_size=min(length, 256))
    leaves = jnp.maximum(count - keep, 0)
    pair = ranks(jnp.where(visual & ~upper, likeness, -jnp.inf))
    goes = visual & ~upper & (pair < leaves)
    dropped = goes & (pair < (leaves * DROPPED).astype(jnp.int32))
    into = jnp.where(goes, best, jnp.arange(length))
    into = jnp.where(visual & ~dropped, into, length).astype(jnp.int32)
    return into, jnp.where(goes, -1.0, 1.0) * (length + 1.0) - order
