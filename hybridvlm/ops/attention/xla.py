"""Blockwise attention in plain XLA: tiles of the score matrix, softmax carried along, nothing kept for the backward pass
but the log-sum-exp.

The score matrix is cut into tiles of some query rows (of all heads that share a kv head) by some keys. One `lax.scan`
walks the tiles; what a tile needs is decided by `lax.switch` from the segments and indices that meet in it: nothing (no
query sees a key), no mask (every query sees every key), or a mask. So padding and other segments cost next to nothing, and
the long inner part of a causal row is computed without a mask. Measured on CPU, tiles that stay in the cache are what
counts: one kv head at a time (elsewhere all heads of the batch at once), a few hundred keys.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.ops.attention.reference import EMPTY_LSE

WHOLE_ROWS = 1 << 20  # weights of a head's rows over all keys that are held at once; fewer rows make slow products
FEW_ROWS = 8  # up to so many query rows, the whole score matrix is small: stream the keys once, as they lie
# the score of an unseen key: below the floor of the running maximum, so that its weight is 0
MASK_VALUE = 2 * EMPTY_LSE
NONE_SEEN, ALL_SEEN, SOME_SEEN = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static sizes: rows query rows (times G heads) by columns keys in a tile; pairs (i, j) of tiles to visit."""

    rows: int
    columns: int
    pairs: tuple[tuple[int, int], ...]
    causal: bool
    scale: float


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment: jax.Array | None,
    kv_segment: jax.Array | None,
    q_index: jax.Array | None,
    kv_index: jax.Array | None,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """q [B,T,H,P], k and v [B,L,K,P] -> out [B,T,H,P] in q.dtype, lse [B,H,T] fp32. Arguments as in `api.attention`."""
    b, t, heads, _ = q.shape
    length, kv_heads = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    aligned = causal and q_index is None and kv_index is None
    q_segment = jnp.ones((b, t), jnp.int32) if q_segment is None else q_segment
    kv_segment = jnp.ones((b, length), jnp.int32) if kv_segment is None else kv_segment
    q_index = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)) if q_index is None else q_index
    kv_index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length)) if kv_index is None else kv_index
    if t <= FEW_ROWS:
        return _few_rows(q, k, v, q_segment, kv_segment, q_index, kv_index, causal, scale)

    rows, q_tiles = _tile(t, min(max(1280 // groups, 128), 512))
    columns, kv_tiles = _tile(length, 256)
    pairs = tuple(
        (i, j) for i in range(q_tiles) for j in range(kv_tiles) if not aligned or j * columns < (i + 1) * rows
    )
    tiling = Tiling(rows, columns, pairs, causal, scale)

    # Tiles first, then one row per (example, kv head): q [I,N,G*rows,P], k and v [J,N,columns,P], segments [I,N,rows].
    q = _pad(q, rows * q_tiles).reshape(b, q_tiles, rows, kv_heads, groups, -1)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(q_tiles, b * kv_heads, groups * rows, -1)
    k, v = (
        _pad(x, columns * kv_tiles).reshape(b, kv_tiles, columns, kv_heads, -1).transpose(1, 0, 3, 2, 4)
        .reshape(kv_tiles, b * kv_heads, columns, -1)
        for x in (k, v)
    )  # fmt: skip

    def per_head(x: jax.Array, tiles: int, size: int) -> jax.Array:
        return jnp.repeat(_pad(x, tiles * size).reshape(b, tiles, size).swapaxes(0, 1), kv_heads, axis=1)

    out, lse = _tiled(
        tiling,
        q,
        k,
        v,
        per_head(q_segment, q_tiles, rows),
        per_head(kv_segment, kv_tiles, columns),
        per_head(q_index, q_tiles, rows),
        per_head(kv_index, kv_tiles, columns),
    )
    out = out.reshape(q_tiles, b, kv_heads, groups, rows, -1).transpose(1, 0, 4, 2, 3, 5)
    lse = lse.reshape(q_tiles, b, heads, rows).transpose(1, 2, 0, 3)
    return out.reshape(b, q_tiles * rows, heads, -1)[:, :t], lse.reshape(b, heads, -1)[:, :, :t]


def _tile(length: int, most: int) -> tuple[int, int]:
    """Size and number of the tiles of a length: as equal as can be, so that little is added to fill the last one."""
    tiles = -(-length // most)
    size = -(-length // tiles)
    return (size if tiles == 1 else -(-size // 8) * 8), tiles


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Zeros (segment 0: seen by nobody) after axis 1, up to the length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _few_rows(q, k, v, q_segment, kv_segment, q_index, kv_index, causal, scale):
    """A handful of rows against many keys, as in decoding: bound by reading k and v once, so they must not be moved.

    All kv heads of a key lie side by side, [B,L,K*P]. Each query is written into its head's part of a vector of that
    width, zero elsewhere: K times the arithmetic, which is free here, and no transposed copy of the cache.
    """
    b, t, heads, width = q.shape
    length, kv_heads, out_width = k.shape[1], k.shape[2], v.shape[3]
    own = jnp.repeat(jnp.eye(kv_heads, dtype=q.dtype), heads // kv_heads, axis=0)  # [H,K]
    spread = (q[:, :, :, None, :] * own[:, :, None]).reshape(b, t * heads, kv_heads * width)
    score = jnp.einsum("bmw,blw->bml", spread, k.reshape(b, length, -1), preferred_element_type=jnp.float32)
    seen = _visible(q_segment, kv_segment, q_index, kv_index, causal)[:, :, None]
    score = jnp.where(seen, score.reshape(b, t, heads, length) * scale, MASK_VALUE)
    running_max = jax.lax.stop_gradient(jnp.maximum(jnp.max(score, axis=-1, keepdims=True), EMPTY_LSE))
    weight = jnp.exp(score - running_max)
    total = jnp.sum(weight, axis=-1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    weight = weight.astype(v.dtype).reshape(b, t * heads, length)
    out = jnp.einsum("bml,blw->bmw", weight, v.reshape(b, length, -1), preferred_element_type=jnp.float32)
    out = jnp.einsum("bthkp,hk->bthp", out.reshape(b, t, heads, kv_heads, out_width), own.astype(jnp.float32))
    lse = jnp.where(some, running_max[..., 0] + jnp.log(total), EMPTY_LSE)
    return (out / total[..., None]).astype(q.dtype), lse.swapaxes(1, 2)


def _visible(q_segment, kv_segment, q_index, kv_index, causal):
    """[...,T] and [...,L] -> [...,T,L] bool."""
    seen = (q_segment[..., :, None] == kv_segment[..., None, :]) & (q_segment[..., :, None] > 0)
    return seen & (kv_index[..., None, :] <= q_index[..., :, None]) if causal else seen


def _what_is_seen(tiling: Tiling, q_segment, kv_segment, q_index, kv_index) -> jax.Array:
    """The kind of every tile of `pairs`: [I,N,rows] and [J,N,columns] -> [len(pairs)] of NONE_, ALL_ or SOME_SEEN.

    From extremes alone, so SOME_SEEN may be said where a mask would turn out empty or full; never the other way round.
    """
    big = jnp.iinfo(jnp.int32).max
    i, j = np.asarray(tiling.pairs, np.int32).T

    def extremes(segment, index):
        real = segment > 0
        low = jnp.min(jnp.where(real, segment, big), axis=-1)
        high = jnp.max(segment, axis=-1)
        first = jnp.min(jnp.where(real, index, big), axis=-1)
        last = jnp.max(jnp.where(real, index, -big), axis=-1)
        return low, high, first, last, (low == high) & jnp.all(real, axis=-1)

    q_low, q_high, q_first, q_last, q_one = (x[i] for x in extremes(q_segment, q_index))
    low, high, first, last, one = (x[j] for x in extremes(kv_segment, kv_index))
    meet = (q_low <= high) & (low <= q_high)
    whole = q_one & one & (q_low == low)
    if tiling.causal:
        meet &= first <= q_last
        whole &= last <= q_first
    return jnp.where(jnp.all(whole, axis=1), ALL_SEEN, jnp.where(jnp.any(meet, axis=1), SOME_SEEN, NONE_SEEN))


def _walk(tiling: Tiling, step, carry, kinds: jax.Array):
    """Scan over the tiles: carry = step(carry, i, j, kind)."""
    i, j = np.asarray(tiling.pairs, np.int32).T
    if len(tiling.pairs) == 1:
        return step(carry, 0, 0, kinds[0])
    return jax.lax.scan(lambda carry, at: (step(carry, *at), None), carry, (i, j, kinds))[0]


def _by_platform(function, *arrays):
    """function(*arrays) for arrays [I,N,...], on CPU one n after the other: its tiles then stay in the cache."""

    def one_by_one(*arrays):
        if arrays[0].shape[1] == 1:
            return function(*arrays)
        swapped = tuple(x.swapaxes(0, 1)[:, :, None] for x in arrays)
        out = jax.lax.map(lambda parts: function(*parts), swapped)
        return tuple(x[:, :, 0].swapaxes(0, 1) for x in out)

    return jax.lax.platform_dependent(*arrays, cpu=one_by_one, default=function)


def _scores(tiling: Tiling, q, k):
    score = jnp.einsum("nmp,ncp->nmc", q, k, preferred_element_type=jnp.float32)
    return score * tiling.scale


def _mask(tiling: Tiling, score, q_segment, kv_segment, q_index, kv_index):
    """score [N,G*rows,C] with HIDDEN where a query does not see the key."""
    n, m, c = score.shape
    seen = _visible(q_segment, kv_segment, q_index, kv_index, tiling.causal)[:, None]
    return jnp.where(seen, score.reshape(n, -1, tiling.rows, c), MASK_VALUE).reshape(n, m, c)


def _at(x: jax.Array, i) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: jax.Array, part: jax.Array, i) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, part, i, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(tiling: Tiling, q, k, v, q_segment, kv_segment, q_index, kv_index):
    """q [I,N,M,P], k and v [J,N,C,P], segments and indices [I,N,rows], [J,N,C] -> out [I,N,M,P], lse [I,N,M] fp32."""
    return _by_platform(functools.partial(_forward, tiling), q, k, v, q_segment, kv_segment, q_index, kv_index)


def _forward(tiling: Tiling, q, k, v, q_segment, kv_segment, q_index, kv_index):
    kinds = _what_is_seen(tiling, q_segment, kv_segment, q_index, kv_index)

    def step(carry, i, j, kind):
        def advance(out, running_max, total, hide):
            score = _scores(tiling, _at(q, i), _at(k, j))
            if hide:
                where = (_at(q_segment, i), _at(kv_segment, j), _at(q_index, i), _at(kv_index, j))
                score = _mask(tiling, score, *where)
            new_highest = jnp.maximum(running_max, jnp.max(score, axis=-1))
            weight = jnp.exp(score - new_highest[..., None])
            rescale = jnp.exp(running_max - new_highest)
            total = total * rescale + jnp.sum(weight, axis=-1)
            part = jnp.einsum("nmc,ncp->nmp", weight.astype(v.dtype), _at(v, j), preferred_element_type=jnp.float32)
            return out * rescale[..., None] + part, new_highest, total

        branches = (
            lambda *now: now,
            functools.partial(advance, hide=False),
            functools.partial(advance, hide=True),
        )
        now = jax.lax.switch(kind, branches, *(_at(x, i) for x in carry))
        return tuple(_put(x, part, i) for x, part in zip(carry, now, strict=True))

    shape = q.shape[:-1]
    start = (
        jnp.zeros((*shape, v.shape[-1]), jnp.float32),
        jnp.full(shape, EMPTY_LSE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    out, running_max, total = _walk(tiling, step, start, kinds)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    return (out / total[..., None]).astype(q.dtype), jnp.where(some, running_max + jnp.log(total), EMPTY_LSE)


def _tiled_fwd(tiling: Tiling, *arrays):
    out, lse = _tiled(tiling, *arrays)
    return (out, lse), (*arrays, out, lse)


def _tiled_bwd(tiling: Tiling, saved, gradients):
    d_out, d_lse = gradients
    *arrays, out, lse = saved
    # d score = weight * (d_out·v - d_out·out + d_lse): the last two are the same for all keys of a row.
    shift = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    dq, dk, dv = _by_platform(functools.partial(_backward, tiling), *arrays, lse, shift, d_out)
    return dq, dk, dv, None, None, None, None


def _backward(tiling: Tiling, q, k, v, q_segment, kv_segment, q_index, kv_index, lse, shift, d_out):
    kinds = _what_is_seen(tiling, q_segment, kv_segment, q_index, kv_index)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def step(carry, i, j, kind):
        def advance(dq, dk, dv, hide):
            score = _scores(tiling, _at(q, i), _at(k, j)) - _at(lse, i)[..., None]
            if hide:
                where = (_at(q_segment, i), _at(kv_segment, j), _at(q_index, i), _at(kv_index, j))
                score = _mask(tiling, score, *where)
            weight = jnp.exp(score)
            d_weight = dot("nmp,ncp->nmc", _at(d_out, i), _at(v, j))
            d_score = (weight * (d_weight - _at(shift, i)[..., None]) * tiling.scale).astype(q.dtype)
            dq = dq + dot("nmc,ncp->nmp", d_score, _at(k, j))
            dk = dk + dot("nmc,nmp->ncp", d_score, _at(q, i))
            dv = dv + dot("nmc,nmp->ncp", weight.astype(v.dtype), _at(d_out, i))
            return dq, dk, dv

        branches = (
            lambda *now: now,
            functools.partial(advance, hide=False),
            functools.partial(advance, hide=True),
        )
        blocks = (i, j, j)
        now = jax.lax.switch(kind, branches, *(_at(x, n) for x, n in zip(carry, blocks, strict=True)))
        return tuple(_put(x, part, n) for x, part, n in zip(carry, now, blocks, strict=True))

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    grads = _walk(tiling, step, start, kinds)
    return tuple(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


SCORE_BLOCK = 2048  # keys whose scores are worked out at once


def text_to_visual(
    q: jax.Array,
    k: jax.Array,
    *,
    lse: jax.Array,
    row_weight: jax.Array,
    q_segment: jax.Array,
    kv_segment: jax.Array,
    q_index: jax.Array,
    kv_index: jax.Array,
    heads: str,
    queries: str,
    causal: bool,
    scale: float,
) -> jax.Array:
    """q [B,R,H,P], k [B,L,K,P], lse [B,H,R], row_weight [B,R] -> score [B,L] fp32. Arguments as in `visual`."""
    b, rows, head_count, _ = q.shape
    length = k.shape[1]

    # Head by head: weights of one head are all that exists at a time, and both reductions over heads run at matmul speed
    # (a reduction over the leading axis of a whole [H,R,C] is several times slower on CPU).
    head_queries = (
        jnp.moveaxis(q, 2, 0),
        jnp.arange(head_count) // (head_count // k.shape[2]),
        jnp.moveaxis(lse, 1, 0),
    )

    def score_block(keys: jax.Array, segment: jax.Array, index: jax.Array) -> jax.Array:
        """keys [B,C,K,P], segment and index [B,C] -> [B,C]."""
        keys = jnp.moveaxis(keys, 2, 0)

        def add_head(total: jax.Array, head: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            queries_of_head, kv_head, lse_of_head = head
            keys_of_head = jax.lax.dynamic_index_in_dim(keys, kv_head, keepdims=False)
            raw = jnp.einsum("brp,bcp->brc", queries_of_head, keys_of_head, preferred_element_type=jnp.float32)
            # The difference is at most 0 for a key that is seen; held there, so that an unseen key cannot overflow.
            weight = jnp.exp(jnp.minimum(raw * scale - lse_of_head[..., None], 0.0))
            return (total + weight / head_count if heads == "mean" else jnp.maximum(total, weight)), None

        weight, _ = jax.lax.scan(add_head, jnp.zeros((b, rows, keys.shape[2]), jnp.float32), head_queries)
        seen = _visible(q_segment, segment, q_index, index, causal)
        weight = jnp.where(seen, weight, 0.0)
        if queries == "max":
            return jnp.max(weight * row_weight[:, :, None], axis=1)
        return jnp.einsum("br,brc->bc", row_weight, weight)

    block = min(SCORE_BLOCK, length)
    whole = length // block * block
    blocks = whole // block

    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array[:, :whole].reshape(b, blocks, block, *array.shape[2:]), 1, 0)

    if blocks <= 1:
        score = score_block(k[:, :whole], kv_segment[:, :whole], kv_index[:, :whole])
    else:
        score = jax.lax.map(lambda part: score_block(*part), (split(k), split(kv_segment), split(kv_index)))
        score = jnp.moveaxis(score, 0, 1).reshape(b, whole)
    if whole < length:
        rest = score_block(k[:, whole:], kv_segment[:, whole:], kv_index[:, whole:])
        score = jnp.concatenate([score, rest], axis=1)
    return score


def score_gradients(
    options: tuple[tuple[str, Any], ...], arrays: tuple[jax.Array, ...], d_score: jax.Array
) -> tuple[jax.Array | None, ...]:
    """The backward pass of kernels that are `text_to_visual` forwards, as `jax.custom_vjp` wants it.

    Args:
        options: heads, queries, causal and scale.
        arrays: q, k, lse, row_weight, q_segment, kv_segment, q_index, kv_index.
        d_score: [B,L], of the score.
    """
    names = ("lse", "row_weight", "q_segment", "kv_segment", "q_index", "kv_index")

    def by_xla(q: jax.Array, k: jax.Array, lse: jax.Array, row_weight: jax.Array) -> jax.Array:
        rest: dict[str, Any] = dict(zip(names, (lse, row_weight, *arrays[4:]), strict=True))
        return text_to_visual(q, k, **rest, **dict(options))

    return *jax.vjp(by_xla, *arrays[:4])[1](d_score), None, None, None, None


def text_to_visual_once(
    q: jax.Array,
    k: jax.Array,
    *,
    row_weight: jax.Array,
    q_segment: jax.Array,
    kv_segment: jax.Array,
    q_index: jax.Array,
    kv_index: jax.Array,
    heads: str,
    queries: str,
    causal: bool,
    scale: float,
) -> jax.Array:
    """`text_to_visual` where the rows' log-sum-exp is not known: one product with the keys and one exponential give both.

    A few rows at a time, as the weights of one head over the whole of them are held.
    """
    b, rows, head_count, _ = q.shape
    length = k.shape[1]
    keys = jnp.moveaxis(k, 2, 0)
    blocks = -(-rows // max(1, WHOLE_ROWS // (b * length)))
    size = -(-rows // blocks)

    def split(array: jax.Array, axis: int) -> jax.Array:
        """A block of rows along a new first axis; rows that fill up the last one see nothing, as their segment is 0."""
        pad = [(0, blocks * size - rows if at == axis else 0) for at in range(array.ndim)]
        shape = (*array.shape[:axis], blocks, size, *array.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(array, pad).reshape(shape), axis, 0)

    linear = heads == "mean" and queries == "sum"

    def add_rows(score: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        queries_of_rows, weight_of_row, segment, index = block
        seen = _visible(segment, kv_segment, index, kv_index, causal)

        def add_head(total: jax.Array, head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            queries_of_head, kv_head = head
            keys_of_head = jax.lax.dynamic_index_in_dim(keys, kv_head, keepdims=False)
            raw = jnp.einsum("brp,bcp->brc", queries_of_head, keys_of_head, preferred_element_type=jnp.float32)
            raw = jnp.where(seen, raw * scale, MASK_VALUE)
            top = jax.lax.stop_gradient(jnp.maximum(jnp.max(raw, axis=-1, keepdims=True), EMPTY_LSE))
            weight = jnp.exp(raw - top)
            # a row that sees anything has a weight of 1 among its own
            share = 1 / jnp.maximum(jnp.sum(weight, axis=-1), 1.0)
            if linear:
                return total + jnp.einsum("br,brc->bc", weight_of_row * share / head_count, weight), None
            weight = weight * share[..., None]
            return (total + weight / head_count if heads == "mean" else jnp.maximum(total, weight)), None

        empty = score if linear else jnp.zeros((b, size, length), jnp.float32)
        total, _ = jax.lax.scan(
            add_head, empty, (queries_of_rows, jnp.arange(head_count) // (head_count // k.shape[2]))
        )
        if linear:
            return total, None
        if queries == "max":
            return jnp.maximum(score, jnp.max(total * weight_of_row[:, :, None], axis=1)), None
        return score + jnp.einsum("br,brc->bc", weight_of_row, total), None

    given = split(jnp.moveaxis(q, 2, 0), 2), split(row_weight, 1), split(q_segment, 1), split(q_index, 1)
    # the backward pass works the weights out again rather than keeping them all
    return jax.lax.scan(jax.checkpoint(add_rows), jnp.zeros((b, length), jnp.float32), given)[0]
