"""What several methods choose by: ranks, flags, exact shares of a count, order of diversity. All with static shapes.

Scores of `flagged` keep a method's own decision where the plan's count is the method's, and otherwise drop the
worst of its choice or readmit the best of the rest, so that every method keeps exactly what its plan says.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_NORM = 1e-12


def ranks(score: jax.Array) -> jax.Array:
    """Position of every entry in descending order along the last axis, ties to the earlier: int32 of score's shape."""
    order = jnp.argsort(-score, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def flagged(flag: jax.Array, tiebreak: jax.Array) -> jax.Array:
    """Scores that rank by flag [B,n] (int or bool, the largest first), then by tiebreak [B,n], then the earlier:
    fp32.

    They are positions, negated: a sum of both would round the tiebreak.
    """
    index = jnp.broadcast_to(jnp.arange(flag.shape[-1]), flag.shape)
    order = jnp.lexsort((index, -tiebreak, -flag.astype(jnp.int32)), axis=-1)
    return -jnp.argsort(order, axis=-1, stable=True).astype(jnp.float32)


def frames_of(frame_count: jax.Array, frames: int) -> jax.Array:
    """Which frames are real: [B,F] bool."""
    return jnp.arange(frames) < frame_count[:, None]


def unit(x: jax.Array) -> jax.Array:
    """x [...,D] at length 1 in float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)), _NORM)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of a and b [...,D] along the last axis, float32; exactly 1 of equal vectors, 0 with zeros."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    same = jnp.all(a == b, axis=-1) & jnp.any(a != 0, axis=-1)
    return jnp.where(same, 1.0, jnp.sum(unit(a) * unit(b), axis=-1))


def apportion(total: jax.Array, counts: jax.Array, group: jax.Array | None = None) -> jax.Array:
    """`total` handed out over parts in proportion to `counts` [P], exactly: [P] int32.

    Every part gets the whole part of its share, the rest goes to the largest fractions, ties to the earlier, never
    more than a part has. With group [P] int32, total [P] holds each group's own total (at its number), and only its
    parts take of it.
    """
    parts = counts.shape[0]
    group = jnp.zeros(parts, jnp.int32) if group is None else group
    total = jnp.broadcast_to(total, (parts,)).astype(jnp.int32) if jnp.ndim(total) == 0 else total.astype(jnp.int32)
    counts = counts.astype(jnp.int32)
    held = jnp.zeros(parts, jnp.int32).at[group].add(counts)
    wanted = jnp.minimum(total, held)[group]
    whole = jnp.maximum(held[group], 1)
    floor, fraction = _scaled(counts, wanted, whole)
    rest = wanted - jnp.zeros(parts, jnp.int32).at[group].add(floor)[group]
    order = jnp.lexsort((jnp.arange(parts), -fraction, group))
    first = jnp.zeros(parts, jnp.int32).at[group].add(1)
    start = jnp.cumsum(first) - first
    rank = jnp.zeros(parts, jnp.int32).at[order].set(jnp.arange(parts, dtype=jnp.int32)) - start[group]
    return floor + ((rank < rest) & (fraction > 0)).astype(jnp.int32)


def _scaled(counts: jax.Array, wanted: jax.Array, whole: jax.Array) -> tuple[jax.Array, jax.Array]:
    """counts * wanted divided by whole (at least both): (quotient, remainder) int32.

    By long division, bit by bit: the product of two counts of a long video is more than an int32 holds.
    """

    def bit(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        quotient, rest = carry
        rest = 2 * rest + jnp.where(counts >> (30 - i) & 1, wanted, 0)
        return 2 * quotient + rest // whole, rest % whole

    empty = jnp.zeros_like(counts)
    return jax.lax.fori_loop(0, 31, bit, (empty, empty))


def diverse_order(x: jax.Array, real: jax.Array, picks: int, weight: jax.Array | None = None) -> jax.Array:
    """Greedy max-min order of tokens by 1 - cosine: x [n,D], real [n] bool -> rank [n] int32, n for what is not
    picked.

    The first is the one whose nearest neighbour is farthest, each further one the one that is farthest from all
    before it; ties to the earlier. weight [n]: factor of a token's distances to others, as a candidate.
    """
    n, y = x.shape[0], unit(x)
    scale = jnp.ones(n, jnp.float32) if weight is None else weight.astype(jnp.float32)

    def from_token(i: jax.Array) -> jax.Array:
        """Distances of all tokens from token i: [n]."""
        # rounding must not tell equal tokens apart
        apart = jnp.where(jnp.all(y == y[i], axis=-1), 0.0, jnp.maximum(1.0 - y @ y[i], 0.0))
        return jnp.where(real[i], apart, jnp.inf) * scale

    def nearest(i: jax.Array) -> jax.Array:
        return jnp.min(jnp.where((jnp.arange(n) == i) | ~real, jnp.inf, from_token(i) / scale))

    alone = jax.lax.map(nearest, jnp.arange(n), batch_size=min(n, 64)) * scale
    start = jnp.where(real, jnp.nan_to_num(alone, posinf=3e38), -jnp.inf)

    def pick(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        rank, apart, chosen_by = carry
        best = jnp.argmax(chosen_by).astype(jnp.int32)
        some = chosen_by[best] > -jnp.inf
        rank = jnp.where(some, rank.at[best].set(i), rank)
        apart = jnp.where(some, jnp.minimum(apart, from_token(best)), apart)
        return rank, apart, jnp.where(real & (rank == n), apart, -jnp.inf)

    empty = jnp.full(n, n, jnp.int32), jnp.full(n, jnp.inf, jnp.float32), start
    return jax.lax.fori_loop(0, min(picks, n), pick, empty)[0]
