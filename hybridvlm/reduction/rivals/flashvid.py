"""FlashVID's outer stage (arXiv 2602.08024): diverse tokens that the tower sees stay, others merge along trees in time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.fold import Selection
from hybridvlm.reduction.choose import apportion, diverse_order, flagged, frames_of, unit
from hybridvlm.reduction.cluster import clusters, frame_likeness, mean_weights, segments_of
from hybridvlm.reduction.methods import FEATURES, PlanView, _register
from hybridvlm.reduction.rivals.fastvid import scenes
from hybridvlm.reduction.schedules import SHARE_ONE

SEGMENTS, TAU, LINK, DIVERSE, NEIGHBOURS = 8, 0.9, 0.8, 0.7, 7


@_register(
    "flashvid-outer",
    "input",
    reads=FEATURES,
    needs=("attention",),
    scoring=lambda visual, kept, frames, width: 6 * visual * visual // max(1, frames) * width,
)
def flashvid(visual: jax.Array, frame_count: jax.Array, plan: PlanView, attention: jax.Array) -> Selection:
    """before layer 0, diverse tokens that the tower attends to; the others merge along trees in time

    The outer stage of the pair "flashvid" (pairs.py).
    """
    frames, m = visual.shape[1:3]
    diverse = -int(-DIVERSE * max(1, int(plan.input_share * m / SHARE_ONE)) // 1)
    row = (visual, frames_of(frame_count, frames), attention, plan.keep(0, frame_count * m))
    return Selection(*jax.lax.map(lambda r: flashvid_video(r[0], r[1], r[2], r[3], diverse), row))


def link_to_previous(visual: jax.Array, free: jax.Array, segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(parent [F,m] int32, likeness [F,m]): the most alike free token of the frame before in its scene; -inf: none."""
    y = unit(visual)
    before = jnp.concatenate([y[:1], y[:-1]])
    may = jnp.concatenate([jnp.zeros_like(free[:1]), free[:-1]]) & (segment == jnp.roll(segment, 1))[:, None]
    likeness = jnp.where(may[:, None], jnp.einsum("fmd,fnd->fmn", y, before), -jnp.inf)
    return jnp.argmax(likeness, axis=-1).astype(jnp.int32), jnp.where(free, likeness.max(-1), -jnp.inf)


def tree_roots(parent: jax.Array, linked: jax.Array) -> jax.Array:
    """The root of every token: parent [F,m] in the frame before, linked [F,m] bool -> position [F,m] int32 in F*m."""
    frames, m = parent.shape
    own = jnp.arange(frames * m, dtype=jnp.int32).reshape(frames, m)

    def step(above: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        up, is_linked, mine = row
        root = jnp.where(is_linked, above[up], mine)
        return root, root

    return jax.lax.scan(step, own[0], (parent, linked, own))[1]


def flashvid_video(
    visual: jax.Array, real: jax.Array, attention: jax.Array, keep: jax.Array, diverse: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(score [M], into [1,M], weight [1,M]) of one video: visual [F,m,D], real [F] bool, attention [F,m], keep of
    its tokens.

    Scenes end where likeness of frame means is below .9, and at the least alike so that there are 8. Of each frame
    `diverse` tokens (.7 of what it keeps) are picked one after another by the largest least distance times
    attention. Every other token links to the most alike of the frame before, above .8 and as long as a scene keeps
    enough roots; trees are averaged into their roots, and the roots of a frame clustered (density peaks, k = 7) to
    its count. As released, but: counts are exact, and handed out over scenes, then frames; a mean is over a whole
    tree (there the divisor counts direct links alone); one-frame scenes are no exception.
    """
    frames, m, _ = visual.shape
    segment = segments_of(
        scenes(frame_likeness(visual), real, min(SEGMENTS, frames), TAU) | (jnp.arange(frames) + 1 == real.sum())
    )
    whole = jnp.ones(m, bool)
    order = jax.vmap(lambda x, a: diverse_order(x, whole, diverse, a))(visual, attention)
    picked = (order < diverse) & real[:, None]
    free = ~picked & real[:, None]
    held = jnp.zeros(frames, jnp.int32).at[segment].add(free.sum(-1))
    quota = apportion(jnp.maximum(keep - picked.sum(), 0), held)
    parent, likeness = link_to_previous(visual, free, segment)
    likeness = jnp.where(likeness > LINK, likeness, -jnp.inf).reshape(-1)
    scene = jnp.repeat(segment, m)
    by_likeness = jnp.lexsort((jnp.arange(frames * m), -likeness, scene))
    in_scene = jnp.zeros(frames, jnp.int32).at[scene].add(1)
    place = jnp.zeros(frames * m, jnp.int32).at[by_likeness].set(jnp.arange(frames * m, dtype=jnp.int32))
    place = place - (jnp.cumsum(in_scene) - in_scene)[scene]
    linked = (place < (held - quota)[scene]) & (likeness > -jnp.inf)
    root = tree_roots(parent, linked.reshape(frames, m))
    to_root = jnp.where(free, root, frames * m).reshape(-1)
    in_tree = mean_weights(to_root)
    flat = visual.reshape(frames * m, -1).astype(jnp.float32)
    means = jnp.zeros_like(flat).at[to_root].add(flat * in_tree[:, None], mode="drop").reshape(visual.shape)
    is_root = free & (root == jnp.arange(frames * m).reshape(frames, m))
    of_frame = apportion(quota, is_root.sum(-1), segment)
    joins, centre = jax.vmap(lambda x, mask, n: clusters(x, mask, NEIGHBOURS, n))(means, is_root, of_frame)
    of_root = jnp.where(joins < m, joins + m * jnp.arange(frames)[:, None], frames * m).reshape(-1)
    in_cluster = jax.vmap(mean_weights)(joins).reshape(-1)
    safe = jnp.minimum(to_root, frames * m - 1)
    into = jnp.where(to_root < frames * m, of_root[safe], frames * m).astype(jnp.int32)
    flag = jnp.where(picked, 2, centre.astype(jnp.int32))
    score = flagged(flag.reshape(1, -1), attention.reshape(1, -1))[0]
    return score, into[None], (in_tree * in_cluster[safe])[None]
