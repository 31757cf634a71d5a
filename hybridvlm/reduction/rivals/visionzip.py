"""VisionZip (arXiv 2412.04467): what the tower attends to stays, the rest of a frame is averaged into a few anchors."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.fold import Selection
from hybridvlm.reduction.choose import ranks, unit
from hybridvlm.reduction.cluster import mean_weights
from hybridvlm.reduction.methods import FEATURES, PlanView, _register
from hybridvlm.reduction.rivals.tome import per_frame_count

DOMINANT = 54 / 64  # of what stays: the smallest of the released pairs, 54 + 10 of 576


@_register(
    "visionzip",
    "input",
    reads=FEATURES,
    needs=("attention",),
    count=per_frame_count,
    floor=lambda frames, m: 1 / m,
    keeps="one token or more of each frame",
)
def visionzip(visual: jax.Array, frame_count: jax.Array, plan: PlanView, attention: jax.Array) -> Selection:
    """before layer 0, the tokens that the tower attends to, and means of the others"""
    batch, frames, m, _ = visual.shape
    kept = plan.capacities[0] // plan.frames
    dominant = round(DOMINANT * kept)
    one = jax.vmap(jax.vmap(lambda keys, a: visionzip_frame(keys, a, dominant, kept - dominant)))
    into, weight, score = one(visual, attention)
    into = jnp.where(into < m, into + m * jnp.arange(frames, dtype=jnp.int32)[:, None], frames * m)
    shape = (batch, 1, frames * m)
    return Selection(score.reshape(batch, -1), into.reshape(shape), weight.reshape(shape))


def visionzip_frame(
    keys: jax.Array, attention: jax.Array, dominant: int, contextual: int, released: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(into [m] int32, m for none; weight [m]; score [m]) of one frame: keys [m,D], attention [m].

    The `dominant` tokens of most attention stay. Of the rest, in order, every (rest // contextual)-th is an anchor,
    and each other one is averaged into the anchor of the most alike key. As released, but: attention is the mean
    over heads and rows of the tower's last block (no CLS token), averaged over the patches of a token; keys are the
    decoder's features, since the tower's are of patches; order is kept; and an anchor enters its mean once
    (`released`: it is added to the mean of the others, which doubles it).
    """
    m = keys.shape[0]
    index = jnp.arange(m, dtype=jnp.int32)
    chosen = ranks(attention) < dominant
    place = jnp.cumsum(~chosen) - 1
    step = max(1, (m - dominant) // max(1, contextual))
    anchor = ~chosen & (place % step == 0) & (place // step < contextual)
    y = unit(keys)
    likeness = jnp.where(anchor[None], y @ y.T, -jnp.inf)
    into = jnp.where(chosen | anchor, index, jnp.argmax(likeness, axis=-1).astype(jnp.int32))
    into = jnp.where(chosen | anchor | anchor.any(), into, m)
    weight = mean_weights(into)
    if released:
        others = jnp.zeros(m, jnp.int32).at[into].add(1, mode="drop")[jnp.minimum(into, m - 1)] - 1
        weight = jnp.where(into == index, 1.0, 1.0 / jnp.maximum(others, 1))
    return into, weight, jnp.where(chosen, 2.0, jnp.where(anchor, 1.0, 0.0)) + 0.0 * attention
