"""FastVID (arXiv 2503.11187): scenes, and in each salient tokens and means around anchors of every fourth frame."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.fold import Selection
from hybridvlm.reduction.choose import flagged, frames_of, ranks, unit
from hybridvlm.reduction.cluster import dpc_knn, frame_likeness, segments_of
from hybridvlm.reduction.methods import FEATURES, PlanView, _register

SEGMENTS, TAU, CONTEXT, STEP, BETA, NEIGHBOURS = 8, 0.9, 0.4, 4, 0.6, 4


@_register(
    "fastvid",
    "input",
    reads=FEATURES,
    needs=("attention",),
    count=lambda frames, m, share: frames * max(1, int(share * m + 1e-9)),
    floor=lambda frames, m: 1 / m,
    keeps="one token or more of each frame",
    scoring=lambda visual, kept, frames, width: 2 * visual * visual * width // STEP,
)
def fastvid(visual: jax.Array, frame_count: jax.Array, plan: PlanView, attention: jax.Array) -> Selection:
    """before layer 0, scenes; salient tokens, and means around anchors of every fourth frame"""
    kept, frames = plan.capacities[0] // plan.frames, visual.shape[1]
    parts = jax.lax.map(
        lambda row: fastvid_video(row[0], row[1], row[2], kept), (visual, frames_of(frame_count, frames), attention)
    )
    return Selection(*parts)


def scenes(likeness: jax.Array, real: jax.Array, count: int, tau: float) -> jax.Array:
    """Where a scene ends: likeness [F] of a frame with the next, real [F] -> [F] bool.

    After the count - 1 least alike, and wherever the likeness is below tau.
    """
    inside = jnp.append(real[1:], False)
    t = jnp.where(inside, likeness, jnp.inf)
    return inside & ((ranks(-t) < count - 1) | (t < tau))


def anchor_frames(segment: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(is [F], which of its segment's anchor frames, from 0 [F]; how many that has [F]): every fourth from its end."""
    frames = len(segment)
    number = jnp.arange(frames)
    last = jnp.full(frames, -1).at[segment].max(jnp.where(real, number, -1))[segment]
    first = jnp.full(frames, frames).at[segment].min(number)[segment]
    is_anchor = real & ((last - number) % STEP == 0)
    length = last - first + 1
    how_many = (length + STEP - 1) // STEP
    return is_anchor, how_many - 1 - (last - number) // STEP, how_many


def fastvid_video(
    visual: jax.Array, real: jax.Array, attention: jax.Array, kept: int, count: int = SEGMENTS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(score [M], into [A,M], weight [A,M]) of one video: visual [F,m,D], real [F] bool, attention [F,m], kept of
    each frame.

    Scenes end after the 7 least alike neighbours and after all below .9 in likeness of frame means. A frame keeps
    kept - int(.4 kept) tokens by attention. The others of a scene, int(.4 kept) a frame, are shared by its anchor
    frames: there density peaks (k = 4) choose anchors, and every token of the scene that is not salient goes to the
    most alike anchor of each anchor frame: .6 the anchor, .4 the mean. The variant released for LLaVA-Video, whose
    count is exact; frame feature and attention are means, as for towers without a CLS token.
    """
    frames, m, _ = visual.shape
    context = int(CONTEXT * kept)
    segment = segments_of(scenes(frame_likeness(visual), real, min(count, frames), TAU))
    is_anchor, ordinal, how_many = anchor_frames(segment, real)
    salient = (ranks(attention) < kept - context) & real[:, None]
    length = jnp.zeros(frames, jnp.int32).at[segment].add(real.astype(jnp.int32))[segment]
    budget = context * length
    share = budget // jnp.maximum(how_many, 1) + (ordinal < budget % jnp.maximum(how_many, 1))
    peaks = jax.vmap(lambda x, free: dpc_knn(x, free, NEIGHBOURS)[0])(visual, ~salient)
    anchor = is_anchor[:, None] & ~salient & (ranks(peaks) < share[:, None])
    y, slots = unit(visual), -(-frames // STEP)
    frame_of_slot = (
        jnp.full((slots, frames), -1)
        .at[jnp.where(is_anchor, ordinal, slots), segment]
        .max(jnp.arange(frames), mode="drop")
    )

    def slot(of_segment: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What goes where in one anchor frame of every scene: into [M], weight [M]."""
        source = of_segment[segment]
        here = (source >= 0) & real
        safe = jnp.maximum(source, 0)
        likeness = jnp.where(anchor[safe][:, None], jnp.einsum("fmd,fnd->fmn", y, y[safe]), -jnp.inf)
        best = safe[:, None] * m + jnp.argmax(likeness, axis=-1)
        own = (safe == jnp.arange(frames))[:, None] & anchor
        goes = here[:, None] & ~salient & anchor[safe].any(-1)[:, None]
        into = jnp.where(own, jnp.arange(frames * m).reshape(frames, m), best)
        into = jnp.where(goes, into, frames * m).reshape(-1).astype(jnp.int32)
        others = jnp.zeros(frames * m, jnp.int32).at[jnp.where(own.reshape(-1), frames * m, into)].add(1, mode="drop")
        count = others[jnp.minimum(into, frames * m - 1)]
        weight = jnp.where(own.reshape(-1), jnp.where(count > 0, BETA, 1.0), (1.0 - BETA) / jnp.maximum(count, 1))
        return into, weight

    into, weight = jax.lax.map(slot, frame_of_slot)
    flag = jnp.where(salient, 2, anchor.astype(jnp.int32))
    return flagged(flag.reshape(1, -1), attention.reshape(1, -1))[0], into, weight
