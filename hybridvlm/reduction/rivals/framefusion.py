"""FrameFusion (arXiv 2501.01986): tokens that repeat the frame before merge in the first layers; one drop."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.config import ATTENTION, MIXERS, Schedule, ScoreOptions
from hybridvlm.ops.fold import Selection
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import schedules, scores
from hybridvlm.reduction.choose import cosine
from hybridvlm.reduction.cluster import mean_weights
from hybridvlm.reduction.methods import LAST_QUERY, Aux, PlanView, _register

CELL, GIVEN = "framefusion_cell", "tokens_given"
MERGES = 3
_LAST = ScoreOptions(queries="last")


def sites(pattern: str, schedule: Schedule) -> tuple[int, ...]:
    """The first three M or * layers, and the first * after them."""
    first = tuple(i for i, kind in enumerate(pattern[:-1]) if kind in MIXERS)[:MERGES]
    drop = tuple(i for i, kind in enumerate(pattern[:-1]) if kind == ATTENTION and first and i > first[-1])[:1]
    return first + drop


def tokens_given(tokens: Tokens, segments: int) -> jax.Array:
    """Visual tokens that each token's example came with: [B,L] int32."""
    given = jnp.zeros(tokens.segment.shape, jnp.int32)
    for segment in range(1, segments + 1):
        mine = tokens.segment == segment
        given = jnp.where(mine, (mine & tokens.visual).sum(-1, keepdims=True), given)
    return given


def prepare(tokens: Tokens, plan: PlanView, segments: int) -> dict[str, jax.Array]:
    """Which cell of its frame each token is (0 to m - 1), and how many tokens there were."""
    same = (tokens.frame == jnp.roll(tokens.frame, 1, axis=1)) & (tokens.segment == jnp.roll(tokens.segment, 1, axis=1))
    same = same.at[:, 0].set(False) & tokens.visual
    place = jnp.arange(tokens.length)
    start = jax.lax.cummax(jnp.where(same, 0, place), axis=1)
    return {CELL: place - start, GIVEN: tokens_given(tokens, segments)}


@_register(
    "framefusion",
    "decoder",
    reads=LAST_QUERY,
    score=_LAST,
    all_heads=True,
    merges=True,
    prepare=prepare,
    sites=sites,
    curve=lambda schedule, layers: schedules.geometric_curve,
    where="the first three M or *, then the next *",
)
def framefusion(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> Selection:
    """tokens that repeat the frame before merge after the first layers, then one drop by attention

    The static version of the release: there the likeness of a video decides when merging ends and how much is left
    to drop, here each of three merges and the drop keep an equal part of what the one before left, solved to the
    budget. The release merges before layer 0 and between attention and MLP of every layer; here after the first
    three M or * layers.
    """
    if layer == plan.sites[-1] and isinstance(aux, AttentionAux):
        return Selection(scores.attention_score(aux, tokens, _LAST))
    into, score = jax.vmap(lambda *row: merge_repeats(*row))(
        tokens.x,
        tokens.visual & (tokens.segment > 0),
        tokens.extra[CELL] + tokens.segment * tokens.length,
        tokens.segment,
        plan.keep(layer + 1, tokens.extra[GIVEN]),
    )
    return Selection(score, into[:, None], jax.vmap(mean_weights)(into)[:, None])


def merge_repeats(
    x: jax.Array, visual: jax.Array, cell: jax.Array, segment: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(into [L] int32, score [L]) of a row: x [L,D], visual [L] bool, cell and segment [L] int32, keep [L]: tokens
    left to its segment.

    The visual tokens that are most like the one before in their cell, as many as are too many, join its run; a run
    goes into its first.
    """
    length = len(cell)
    index = jnp.arange(length)
    order = jnp.lexsort((index, jnp.where(visual, cell, jnp.iinfo(jnp.int32).max)))
    here, kind, real = x[order], cell[order], visual[order]
    follows = (kind[1:] == kind[:-1]) & real[1:] & real[:-1]
    likeness = jnp.append(jnp.full(1, -jnp.inf), jnp.where(follows, cosine(here[1:], here[:-1]), -jnp.inf))
    likeness = jnp.zeros(length, jnp.float32).at[order].set(likeness)
    # a rank inside the segment: the most alike first, ties to the later, so that of equals the earlier stay
    by = jnp.lexsort((-index, -likeness, jnp.where(visual, segment, 0)))
    group = jnp.where(visual, segment, 0)
    counts = jnp.zeros(length + 1, jnp.int32).at[group].add(1)
    rank = jnp.zeros(length, jnp.int32).at[by].set(index.astype(jnp.int32)) - (jnp.cumsum(counts) - counts)[group]
    goes = visual & (rank < counts[group] - keep) & (likeness > -jnp.inf)
    starts = jnp.where(goes[order], -1, index)
    first = order[jax.lax.cummax(starts)]
    into = jnp.zeros(length, jnp.int32).at[order].set(first.astype(jnp.int32))
    return jnp.where(visual, into, length), rank.astype(jnp.float32)
