"""How much the question looks at each visual token: softmax weights of query rows, reduced, never whole in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.attention.api import attention, check_shapes
from hybridvlm.ops.attention.reference import visible_mask

REDUCTIONS = {"heads": ("mean", "max"), "queries": ("mean", "max", "last")}


def text_to_visual(
    q: jax.Array,
    k: jax.Array,
    *,
    q_mask: jax.Array,
    visual: jax.Array,
    lse: jax.Array | None = None,
    q_segment: jax.Array | None = None,
    kv_segment: jax.Array | None = None,
    q_index: jax.Array | None = None,
    kv_index: jax.Array | None = None,
    heads: str = "mean",
    queries: str = "mean",
    causal: bool = True,
    scale: float | None = None,
    block: int = 2048,
) -> jax.Array:
    """Softmax weight of the question's rows on each visual token, reduced to one score per token.

    q [B,R,H,P]: the query rows, those with q_mask [B,R] False are unused; k [B,L,K,P]: all keys; visual [B,L] bool.
    The softmax runs over every key that a row sees (text too), by the rule of `attention`: same nonzero segment, and
    kv_index <= q_index when `causal`. Query rows usually stand late in the row: pass their places as q_index [B,R]
    (kv_index None counts from 0); without q_index every row is taken to stand after all keys.
    lse [B,H,R] fp32: the rows' log-sum-exp as `attention` returns it; None computes it in a first pass over k.

    heads: "mean" or "max" over the H heads; queries: "mean", "max" or "last" over the rows that are valid, apart for each
    segment: a key is scored only by rows of its own segment. Heads are reduced first, then rows.
    At most [B,R,block] weights exist at a time; `block` is a number of keys.

    Returns score [B,L] fp32, 0 where `visual` is False and where a segment has no valid row.
    Raises ValueError for shapes that do not fit together or an unknown reduction.
    """
    check_shapes(q, k, None, q_segment, kv_segment, q_index, kv_index)
    for name, value in (("heads", heads), ("queries", queries)):
        if value not in REDUCTIONS[name]:
            raise ValueError(f"{name}: expected one of {REDUCTIONS[name]}, got {value!r}")
    b, rows, head_count, width = q.shape
    length, kv_heads = k.shape[1], k.shape[2]
    for name, array, shape in (("q_mask", q_mask, (b, rows)), ("visual", visual, (b, length))):
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if lse is not None and lse.shape != (b, head_count, rows):
        raise ValueError(f"lse: expected [B,H,R] = {(b, head_count, rows)}, got {lse.shape}")

    scale = width**-0.5 if scale is None else scale
    q_segment = jnp.ones((b, rows), jnp.int32) if q_segment is None else q_segment
    q_segment = jnp.where(q_mask, q_segment, 0)
    kv_segment = jnp.ones((b, length), jnp.int32) if kv_segment is None else kv_segment
    kv_index = jnp.broadcast_to(jnp.arange(length), (b, length)) if kv_index is None else kv_index
    if q_index is None:
        q_index = jnp.full((b, rows), jnp.iinfo(jnp.int32).max, jnp.int32)
    if lse is None:
        _, lse = attention(
            q,
            k,
            k[..., :1],
            q_segment=q_segment,
            kv_segment=kv_segment,
            q_index=q_index,
            kv_index=kv_index,
            causal=causal,
            scale=scale,
        )

    row_weight = q_mask & (q_segment > 0)
    same = q_segment[:, :, None] == q_segment[:, None, :]
    if queries == "last":  # a row with a later valid row of its segment does not count
        later = jnp.arange(rows)[None, :] > jnp.arange(rows)[:, None]
        row_weight &= ~jnp.any(same & later & row_weight[:, None, :], axis=2)
    row_weight = row_weight.astype(jnp.float32)
    if queries == "mean":
        row_weight = row_weight / jnp.maximum(jnp.sum(same * row_weight[:, None, :], axis=2), 1.0)

    # Head by head: weights of one head are all that exists at a time, and both reductions over heads run at matmul speed
    # (a reduction over the leading axis of a whole [H,R,C] is several times slower on CPU).
    head_queries = (
        jnp.moveaxis(q, 2, 0),
        jnp.moveaxis(lse, 1, 0).astype(jnp.float32),
        jnp.arange(head_count) // (head_count // kv_heads),
    )

    def score_block(keys: jax.Array, segment: jax.Array, index: jax.Array) -> jax.Array:
        """keys [B,C,K,P], segment and index [B,C] -> [B,C]."""
        keys = jnp.moveaxis(keys, 2, 0)

        def add_head(total: jax.Array, head: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            queries_of_head, lse_of_head, kv_head = head
            keys_of_head = jax.lax.dynamic_index_in_dim(keys, kv_head, keepdims=False)
            raw = jnp.einsum("brp,bcp->brc", queries_of_head, keys_of_head, preferred_element_type=jnp.float32)
            # The difference is at most 0 for a key that is seen; held there, so that an unseen key cannot overflow.
            weight = jnp.exp(jnp.minimum(raw * scale - lse_of_head[..., None], 0.0))
            return (total + weight / head_count if heads == "mean" else jnp.maximum(total, weight)), None

        weight, _ = jax.lax.scan(add_head, jnp.zeros((b, rows, keys.shape[2]), jnp.float32), head_queries)
        seen = visible_mask(q_segment, segment, q_index, index, causal)
        weight = jnp.where(seen, weight, 0.0)
        if queries == "max":
            return jnp.max(weight * row_weight[:, :, None], axis=1)
        return jnp.einsum("br,brc->bc", row_weight, weight)

    block = min(block, length)
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
    return jnp.where(visual, score, 0.0)
