"""DivPrune (arXiv 2503.02175): the most diverse tokens, picked one after another by the largest least distance.

Distance is 1 - cosine of the features as the decoder gets them. The order of picks is a score by itself: more picks
extend fewer. The paper keeps r = .098. As released, but that survivors stay in their order. M picks over M tokens
are one after the other: `divprune` suits up to about 8,000 tokens, `divprune-frame` picks inside each frame, all
frames side by side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.reduction.choose import diverse_order, frames_of
from hybridvlm.reduction.methods import FEATURES, PlanView, _register


@_register(
    "divprune",
    "input",
    reads=FEATURES,
    scoring=lambda visual, kept, frames, width: 2 * visual * width * (visual + kept),
)
def divprune(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> jax.Array:
    """before layer 0, the most diverse tokens of the video (largest least distance)"""
    batch, frames, m, width = visual.shape
    real = jnp.repeat(frames_of(frame_count, frames), m, axis=1)
    flat = visual.reshape(batch, frames * m, width)
    rank = jax.lax.map(lambda row: diverse_order(row[0], row[1], plan.capacities[0]), (flat, real))
    return -rank.astype(jnp.float32)


@_register(
    "divprune-frame",
    "input",
    reads=FEATURES,
    scoring=lambda visual, kept, frames, width: 2 * visual * width * (visual + kept) // max(1, frames),
)
def divprune_frame(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> jax.Array:
    """before layer 0, the most diverse tokens of each frame, frames alike"""
    m = visual.shape[2]
    picks = min(m, -(-plan.capacities[0] // max(1, plan.frames)) + 1)
    whole = jnp.ones(m, bool)
    rank = jax.vmap(jax.vmap(lambda x: diverse_order(x, whole, picks)))(visual)
    return -rank.astype(jnp.float32).reshape(visual.shape[0], -1)
