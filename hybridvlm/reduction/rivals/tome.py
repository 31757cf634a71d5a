"""ToMe (arXiv 2210.09461): the most alike tokens of a frame merge, pair by pair, in rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.fold import Selection
from hybridvlm.reduction.choose import ranks, unit
from hybridvlm.reduction.methods import FEATURES, PlanView, _register


def kept_of_frame(m: int, share: float) -> int:
    """Tokens that stay of each frame: the nearest to the share, one at least."""
    return max(1, round(share * m))


def per_frame_count(frames: int, m: int, share: float) -> int:
    """Tokens that stay of frames that all keep as many."""
    return frames * kept_of_frame(m, share)


@_register(
    "tome",
    "input",
    reads=FEATURES,
    count=per_frame_count,
    floor=lambda frames, m: 1 / m,
    keeps="one token or more of each frame",
)
def tome(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> Selection:
    """before layer 0, the most alike tokens of each frame merge (bipartite matching, in rounds)"""
    kept = plan.capacities[0] // plan.frames
    root = jax.vmap(jax.vmap(lambda x: tome_roots(x, kept)[0]))(visual)
    return selection_of_roots(root)


def selection_of_roots(root: jax.Array) -> Selection:
    """Roots inside each frame [B,F,m] as a Selection: means at the roots."""
    batch, frames, m = root.shape
    sizes = jax.vmap(jax.vmap(lambda r: jnp.zeros(m, jnp.int32).at[r].add(1)))(root)
    weight = 1.0 / jnp.take_along_axis(sizes, root, axis=-1)
    into = root + m * jnp.arange(frames, dtype=jnp.int32)[:, None]
    shape = (batch, 1, frames * m)
    return Selection((sizes > 0).astype(jnp.float32).reshape(batch, -1), into.reshape(shape), weight.reshape(shape))


def tome_roots(x: jax.Array, kept: int, size: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Where each token of a frame ends: x [m,D], size [m] (default 1) -> (root [m] int32, sizes [m], 0 of what was
    merged).

    A round: of the tokens that are left the even ones seek the most alike odd one (cosine of merged features); the
    best edges merge, into the odd one's place, as size-weighted means. As published, but on the decoder's features
    instead of a tower's keys, and in rounds of at most half until `kept` are left (as TimeViper does before its
    decoder); order is kept, and sizes weigh nothing in later attention.
    """
    m = x.shape[0]
    x = x.astype(jnp.float32)
    size = jnp.ones(m, jnp.float32) if size is None else size.astype(jnp.float32)
    root, alive, left = jnp.arange(m, dtype=jnp.int32), jnp.ones(m, bool), m
    while left > kept:
        place = jnp.cumsum(alive) - 1
        seeks, sought = alive & (place % 2 == 0), alive & (place % 2 == 1)
        y = unit(x)
        likeness = jnp.where(sought[None], y @ y.T, -jnp.inf)
        best, value = jnp.argmax(likeness, axis=-1), jnp.max(likeness, axis=-1)
        merges = min(left - kept, left // 2)
        goes = ranks(jnp.where(seeks, value, -jnp.inf)) < merges
        target = jnp.where(goes, best, jnp.arange(m)).astype(jnp.int32)
        total = jnp.zeros_like(x).at[target].add(size[:, None] * x)
        size = jnp.zeros_like(size).at[target].add(size)
        x = total / jnp.maximum(size, 1e-9)[:, None]
        root, alive, left = target[root], alive & ~goes, left - merges
    return root, size
