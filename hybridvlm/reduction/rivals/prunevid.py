"""PruneVid's outer stage (arXiv 2412.16117): scenes by density peaks, still cells averaged, the rest clustered."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.fold import Selection
from hybridvlm.reduction.choose import frames_of, unit
from hybridvlm.reduction.cluster import clusters, segments_of
from hybridvlm.reduction.methods import FEATURES, PlanView, _register
from hybridvlm.reduction.rivals.holitom import parts_selection

STILL, NEIGHBOURS = 0.8, 7


@_register("prunevid-outer", "input", reads=FEATURES)
def prunevid(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> Selection:
    """before layer 0, scenes; still cells averaged over time, then clusters (density peaks)

    The outer stage of the pair "prunevid" (pairs.py).
    """
    frames, m = visual.shape[1:3]
    row = (visual, frames_of(frame_count, frames), plan.keep(0, frame_count * m))
    return Selection(*jax.lax.map(lambda r: prunevid_video(*r), row))


def refine(label: jax.Array, real: jax.Array) -> jax.Array:
    """Labels of frames as stretches: label [F] int32, real [F] bool -> label [F] int32.

    Each label keeps its longest runs, if those are longer than one frame; freed frames join the longer of the runs
    before and after, a tie the one before. With no run left all frames are one.
    """
    frames = len(label)
    label = jnp.where(real, label, -1)
    run = segments_of(jnp.append(label[1:] != label[:-1], True))
    length = jnp.zeros(frames, jnp.int32).at[run].add(1)[run]
    longest = jnp.zeros(frames + 1, jnp.int32).at[label].max(length)[label]
    stays = real & (length == longest) & (length > 1)
    index = jnp.arange(frames)
    before = jax.lax.cummax(jnp.where(stays, index, -1))
    after = jnp.flip(jax.lax.cummin(jnp.flip(jnp.where(stays, index, frames))))
    left = jnp.where(before >= 0, length[jnp.maximum(before, 0)], 0)
    right = jnp.where(after < frames, length[jnp.minimum(after, frames - 1)], 0)
    source = jnp.where(left >= right, jnp.maximum(before, 0), jnp.minimum(after, frames - 1))
    return jnp.where(real, jnp.where(stays.any(), label[source], 0), -1)


def prunevid_video(visual: jax.Array, real: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(score [M], into [1,M], weight [1,M]) of one video: visual [F,m,D], real [F] bool, keep of its tokens.

    Frame means make a quarter as many clusters as there are frames, which are refined to scenes. In a scene a cell
    whose mean cosine over all pairs of frames is above .8 stands still and is averaged over time; the still cells
    of a scene, and the others of a frame, are clustered (density peaks, k = 7) and averaged. As released, but
    counts are exact: there every part larger than 14 is halved, whatever the video. A mean stands at its centre, a
    still one in the scene's first frame.
    """
    frames = visual.shape[0]
    mean = visual.astype(jnp.float32).mean(1)
    joins, _ = clusters(mean, real, NEIGHBOURS, jnp.maximum(real.sum() // 4, 1))
    label = refine(joins, real)
    window = segments_of(jnp.append(label[1:] != label[:-1], True))
    number = jnp.arange(frames)
    first = jnp.full(frames, frames).at[window].min(number)[window]
    length = jnp.zeros(frames, jnp.float32).at[window].add(real.astype(jnp.float32))
    y = unit(visual) * real[:, None, None]
    total = jnp.zeros(y.shape, jnp.float32).at[window].add(y)
    norms = jnp.zeros(y.shape[:2], jnp.float32).at[window].add(jnp.sum(y * y, axis=-1))
    pairs = jnp.maximum(length * (length - 1), 1.0)[:, None]
    still = (jnp.sum(total * total, axis=-1) - norms) / pairs > STILL
    fixed = (still & (length > 1)[:, None])[window] & real[:, None]
    return parts_selection(visual, real, None, keep, window, first, fixed, beta=None)
