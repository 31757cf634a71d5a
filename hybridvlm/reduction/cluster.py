"""Clusters of tokens, and segments of frames, for the methods that merge: masks instead of loops, static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.reduction.choose import cosine, ranks

# Squared distances below this share of the squared norms are rounding of equal vectors.
_ALIKE = 64 * float(jnp.finfo(jnp.float32).eps)


def dpc_knn(x: jax.Array, mask: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Density peaks: x [n,D], mask [n] bool -> (score [n] fp32, -inf off the mask; squared distances [n,n]).

    Distances are Euclidean over the root of D. Density is exp(-mean of the k least squared distances), itself
    included; the score is density times the distance to the nearest denser token, or the largest distance of all
    where none is denser. Of equal densities the earlier counts as denser (released codes draw lots). The centres
    are the highest scores.
    """
    x = x.astype(jnp.float32)
    n, width = x.shape
    square = jnp.sum(x * x, axis=-1)
    both = square[:, None] + square[None]
    apart = both - 2 * jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    apart = jnp.where(apart <= _ALIKE * both, 0.0, apart) / width
    pair = mask[:, None] & mask[None]
    nearest = jnp.sort(jnp.where(pair, apart, jnp.inf), axis=-1)[:, :k]
    real = jnp.isfinite(nearest)
    density = jnp.exp(-jnp.sum(jnp.where(real, nearest, 0.0), axis=-1) / jnp.maximum(real.sum(-1), 1))
    index = jnp.arange(n)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (index[None] < index[:, None]))
    distance = jnp.sqrt(apart)
    peak = jnp.min(jnp.where(denser & pair, distance, jnp.inf), axis=-1)
    peak = jnp.where(jnp.isfinite(peak), peak, jnp.max(jnp.where(pair, distance, 0.0)))
    return jnp.where(mask, density * peak, -jnp.inf), apart


def clusters(x: jax.Array, mask: jax.Array, k: int, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`count` clusters of the tokens x [n,D] of a mask [n]: (the centre of each token's cluster [n] int32, n off
    the mask; centre [n] bool). Centres are the `count` highest scores of `dpc_knn`; the others join the nearest."""
    score, apart = dpc_knn(x, mask, k)
    centre = mask & (ranks(score) < count)
    joins = jnp.argmin(jnp.where(centre[None], apart, jnp.inf), axis=-1).astype(jnp.int32)
    joins = jnp.where(centre, jnp.arange(len(mask), dtype=jnp.int32), joins)
    return jnp.where(mask & centre.any(), joins, len(mask)), centre


def member_counts(into: jax.Array) -> jax.Array:
    """How many tokens of into [n] (n for none) go to each: [n] int32."""
    return jnp.zeros(len(into), jnp.int32).at[into].add(1, mode="drop")


def mean_weights(into: jax.Array) -> jax.Array:
    """Factors by which a fold of into [n] gives means: [n] fp32."""
    counts = member_counts(into)
    return 1.0 / jnp.maximum(counts[jnp.minimum(into, len(into) - 1)], 1)


def anchored_weights(into: jax.Array, beta: float) -> jax.Array:
    """As `mean_weights`, but an anchor has `beta` and the mean of the others the rest; alone it has 1."""
    index = jnp.arange(len(into))
    others = member_counts(into)[jnp.minimum(into, len(into) - 1)] - 1
    own = jnp.where(others > 0, beta, 1.0)
    return jnp.where(into == index, own, (1.0 - beta) / jnp.maximum(others, 1))


def frame_likeness(visual: jax.Array) -> jax.Array:
    """Cosine of each frame's mean feature with the next one's: visual [F,m,D] -> [F], 0 after the last."""
    mean = visual.astype(jnp.float32).mean(1)
    return jnp.append(cosine(mean[:-1], mean[1:]), 0.0)


def segments_of(cut: jax.Array) -> jax.Array:
    """Number of the segment of each frame: cut [F] bool, True where a segment ends -> [F] int32, from 0."""
    return jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), cut[:-1].astype(jnp.int32)]))


def time_means(visual: jax.Array, segment: jax.Array) -> jax.Array:
    """Of every frame, the mean of its segment cell by cell: visual [F,m,D], segment [F] -> [F,m,D] fp32."""
    total = jnp.zeros(visual.shape, jnp.float32).at[segment].add(visual.astype(jnp.float32))
    length = jnp.zeros(len(segment), jnp.float32).at[segment].add(1.0)
    return (total / jnp.maximum(length, 1.0)[:, None, None])[segment]
