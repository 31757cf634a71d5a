"""DART (arXiv 2502.11494): tokens that duplicate few pivots go, pivots being tokens of large keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import schedules
from hybridvlm.reduction.choose import ranks, unit
from hybridvlm.reduction.methods import LAST_QUERY, Aux, PlanView, _register
from hybridvlm.reduction.rivals.oneshot import DEPTH, nearest_attention

PIVOTS = (4, 4)  # visual, of the question


@_register(
    "dart",
    "decoder",
    reads=LAST_QUERY,
    scoring=lambda visual, kept, frames, width: 2 * sum(PIVOTS) * visual * width,
    all_heads=True,
    sites=nearest_attention(DEPTH),
    at_depth=nearest_attention,
    curve=lambda schedule, layers: schedules.ratio_curve,
    where=f"the * nearest to {DEPTH:g} of the depth, or @another",
)
def dart(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> jax.Array:
    """one drop of what duplicates pivots of large keys; needs no attention weights"""
    assert isinstance(aux, AttentionAux)  # its site is an attention layer
    norms = jnp.sum(jnp.abs(aux.k.astype(jnp.float32)), axis=(2, 3))
    total = jnp.zeros(tokens.segment.shape, jnp.float32)
    for segment in range(1, segments + 1):
        mine = tokens.segment == segment
        visual = mine & tokens.visual
        keep = plan.keep_of_entering(layer + 1, visual.sum(-1, dtype=jnp.int32))
        score = jax.vmap(dart_score)(tokens.x, norms, visual, mine & tokens.query, keep)
        total = jnp.where(visual, score, total)
    return total


def dart_score(
    x: jax.Array,
    norms: jax.Array,
    visual: jax.Array,
    query: jax.Array,
    keep: jax.Array,
    pivots: tuple[int, int] = PIVOTS,
) -> jax.Array:
    """DART's choice of `keep` tokens as a score: x [L,D], key norms [L], visual and query [L] bool -> [L] fp32.

    Pivots are the visual tokens, and the question's, of the largest L1 norm of their keys. One pivot after another
    adds the same number of remaining visual tokens that are least like it (cosine). As released after layer 2 of
    32, but: the order of pivots is fixed, visual ones first, by norm (there it is that of a Python set); the visual
    pivots count among the tokens kept, of which the last pivot adds what is left over (there 4 more are kept);
    pivots of text are the question's; cosines are of the residual stream.
    """
    y = unit(x)
    by_norm = [ranks(jnp.where(mask, norms, -jnp.inf)) for mask in (visual, query)]
    first = visual & (by_norm[0] < jnp.minimum(pivots[0], keep))
    there = [jnp.minimum(n, mask.sum()) for n, mask in zip(pivots, (visual, query), strict=True)]
    left = jnp.maximum(keep - there[0], 0)
    share = left // jnp.maximum(there[0] + there[1], 1)
    # what is kept from the start ranks by its norm
    score = jnp.where(first, 1024.0 - by_norm[0], 0.0)
    pairs = [(kind, rank) for kind in (0, 1) for rank in range(pivots[kind])]
    valid = jnp.stack([rank < there[kind] for kind, rank in pairs])
    last = len(pairs) - 1 - jnp.argmax(jnp.flip(valid))
    for number, (kind, rank) in enumerate(pairs):
        pivot = jnp.argmax((by_norm[kind] == rank) & (visual, query)[kind])
        wanted = jnp.where(number == last, left, share) * valid[number]
        unlike = jnp.where(visual & (score == 0), -(y @ y[pivot]), -jnp.inf)
        added = (ranks(unlike) < wanted) & (unlike > -jnp.inf)
        score = jnp.where(added, 512.0 - number, score)
        left = left - added.sum()
    return score
