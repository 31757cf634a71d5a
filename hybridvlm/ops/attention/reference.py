"""Attention with the whole score matrix in memory, in fp32: the yardstick for every other implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EMPTY_LSE = -1e30  # the finite stand-in for the log-sum-exp of a row that sees no key


def visible_mask(
    q_segment: jax.Array, kv_segment: jax.Array, q_index: jax.Array, kv_index: jax.Array, causal: bool
) -> jax.Array:
    """Which key each query row sees: [B,T] and [B,L] -> [B,T,L] bool."""
    seen = (q_segment[:, :, None] == kv_segment[:, None, :]) & (q_segment[:, :, None] > 0)
    return seen & (kv_index[:, None, :] <= q_index[:, :, None]) if causal else seen


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
    b, t, heads, width = q.shape
    length, kv_heads = k.shape[1], k.shape[2]
    q_segment = jnp.ones((b, t), jnp.int32) if q_segment is None else q_segment
    kv_segment = jnp.ones((b, length), jnp.int32) if kv_segment is None else kv_segment
    q_index = jnp.broadcast_to(jnp.arange(t), (b, t)) if q_index is None else q_index
    kv_index = jnp.broadcast_to(jnp.arange(length), (b, length)) if kv_index is None else kv_index

    grouped = q.astype(jnp.float32).reshape(b, t, kv_heads, heads // kv_heads, width)
    seen = visible_mask(q_segment, kv_segment, q_index, kv_index, causal)[:, None, None]
    score = jnp.einsum("btkgp,blkp->bkgtl", grouped * scale, k.astype(jnp.float32))
    score = jnp.where(seen, score, EMPTY_LSE)
    running_max = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
    weight = jnp.where(seen, jnp.exp(score - running_max), 0.0)
    total = jnp.sum(weight, axis=-1)
    any_seen = total > 0
    total = jnp.where(any_seen, total, 1.0)
    out = jnp.einsum("bkgtl,blkp->bkgtp", weight, v.astype(jnp.float32)) / total[..., None]
    lse = jnp.where(any_seen, running_max[..., 0] + jnp.log(total), EMPTY_LSE)
    out = jnp.moveaxis(out, 3, 1).reshape(b, t, heads, v.shape[-1])
    return out.astype(q.dtype), lse.reshape(b, heads, t)


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
    b, rows, head_count, width = q.shape
    grouped = q.astype(jnp.float32).reshape(b, rows, k.shape[2], -1, width)
    score = jnp.einsum("brkgp,blkp->bkgrl", grouped * scale, k.astype(jnp.float32)).reshape(b, head_count, rows, -1)
    seen = visible_mask(q_segment, kv_segment, q_index, kv_index, causal)[:, None]
    weight = jnp.exp(jnp.where(seen, score - lse[..., None], -jnp.inf))
    weight = (jnp.mean(weight, axis=1) if heads == "mean" else jnp.max(weight, axis=1)) * row_weight[..., None]
    return jnp.max(weight, axis=1) if queries == "max" else jnp.sum(weight, axis=1)
