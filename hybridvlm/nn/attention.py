"""Grouped-query attention without position encoding (Nemotron-H), with a ragged key-value cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import ModelConfig
from hybridvlm.nn.caches import AttentionCache
from hybridvlm.ops.attention import attention
from hybridvlm.ops.aux import AttentionAux
from hybridvlm.ops.norms import rms_norm

Params = dict[str, jax.Array]


class AttentionStack(nn.Module):
    """The parameters of all attention layers, stacked: norm [n,D] · q_proj [n,D,H*P] · k_proj, v_proj [n,D,K*P] · o_proj [n,H*P,D]
    · with qk_norm also q_norm, k_norm [n,P] · with attention_bias also q_bias, k_bias, v_bias."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Params:
        c, n = self.config, self.config.count("*")
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,))
        ones = nn.initializers.ones
        q_width, kv_width = c.attention_heads * c.head_dim, c.kv_heads * c.head_dim
        p = {
            "norm": self.param("norm", ones, (n, c.width)),
            "q_proj": self.param("q_proj", dense, (n, c.width, q_width)),
            "k_proj": self.param("k_proj", dense, (n, c.width, kv_width)),
            "v_proj": self.param("v_proj", dense, (n, c.width, kv_width)),
            "o_proj": self.param("o_proj", dense, (n, q_width, c.width)),
        }
        if c.qk_norm:
            p["q_norm"] = self.param("q_norm", ones, (n, c.head_dim))
            p["k_norm"] = self.param("k_norm", ones, (n, c.head_dim))
        if c.attention_bias:
            zeros = nn.initializers.zeros
            p["q_bias"] = self.param("q_bias", zeros, (n, q_width))
            p["k_bias"] = self.param("k_bias", zeros, (n, kv_width))
            p["v_bias"] = self.param("v_bias", zeros, (n, kv_width))
        return p


def _qkv(p: Params, c: ModelConfig, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B,L,D] -> q [B,L,H,P], k and v [B,L,K,P]."""
    h = rms_norm(x, p["norm"], c.norm_eps)
    heads = []
    for name, count in (("q", c.attention_heads), ("k", c.kv_heads), ("v", c.kv_heads)):
        projected = h @ p[f"{name}_proj"].astype(h.dtype)
        if c.attention_bias:
            projected = projected + p[f"{name}_bias"].astype(h.dtype)
        projected = projected.reshape(*x.shape[:2], count, c.head_dim)
        if c.qk_norm and name != "v":
            projected = rms_norm(projected, p[f"{name}_norm"], c.norm_eps)
        heads.append(projected)
    return tuple(heads)


def _output(p: Params, residual: jax.Array, out: jax.Array) -> jax.Array:
    out = out.reshape(*residual.shape[:2], -1)
    return residual + (out @ p["o_proj"].astype(out.dtype)).astype(residual.dtype)


def gather_queries(query: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Places of the query rows: query [B,L] bool -> index [B,capacity] int32 and mask [B,capacity], in order."""
    b, length = query.shape
    slot = jnp.where(query, jnp.cumsum(query, axis=1) - 1, capacity)
    rows = jnp.arange(b)[:, None]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    index = jnp.zeros((b, capacity), jnp.int32).at[rows, slot].set(place, mode="drop")
    return index, jnp.arange(capacity) < jnp.sum(query, axis=1, keepdims=True)


def attention_layer(
    p: Params,
    c: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    *,
    query: jax.Array | None = None,
    query_capacity: int = 0,
    room: int = 0,
) -> tuple[jax.Array, AttentionCache, AttentionAux | None]:
    """One residual attention layer over whole rows.

    x [B,L,D], segment [B,L]. `room`: empty slots added to the cache for tokens to come. With `query` [B,L] bool the rows of
    the question (at most `query_capacity` of them) come back in the aux, for the text-to-visual score.
    """
    q, k, v = _qkv(p, c, x)
    out, lse = attention(q, k, v, q_segment=segment, kv_segment=segment)
    aux = None
    if query is not None:
        index, mask = gather_queries(query, query_capacity)
        aux = AttentionAux(
            q=jnp.take_along_axis(q, index[:, :, None, None], axis=1),
            q_mask=mask,
            q_segment=jnp.where(mask, jnp.take_along_axis(segment, index, axis=1), 0),
            q_index=index,
            k=k,
            lse=jnp.take_along_axis(lse, index[:, None, :], axis=2),
        )
    pad = ((0, 0), (0, room), (0, 0), (0, 0))
    cache = AttentionCache(
        jnp.pad(k, pad), jnp.pad(v, pad), jnp.pad(segment, pad[:2]), jnp.full((), segment.shape[1], jnp.int32)
    )
    return _output(p, x, out), cache, aux


def attention_extend(
    p: Params, c: ModelConfig, x: jax.Array, segment: jax.Array, cache: AttentionCache
) -> tuple[jax.Array, AttentionCache]:
    """New tokens after a cache: x [B,T,D], segment [B,T] (0 = padding at the end; its slots stay empty).

    The caller sees to it that the cache has room (AttentionCache.k.shape[1] >= length + T).
    """
    q, k, v = _qkv(p, c, x)
    t = segment.shape[1]
    keys, values, slots = (
        jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, axis=1)
        for old, new in ((cache.k, k), (cache.v, v), (cache.segment, segment))
    )
    if t == 1:  # a single new token sees every filled slot: no order to check
        out, _ = attention(q, keys, values, q_segment=segment, kv_segment=slots, causal=False)
    else:
        index = jnp.broadcast_to(jnp.arange(slots.shape[1], dtype=jnp.int32), slots.shape)
        place = jnp.broadcast_to(cache.length + jnp.arange(t, dtype=jnp.int32), segment.shape)
        out, _ = attention(q, keys, values, q_segment=segment, kv_segment=slots, q_index=place, kv_index=index)
    return _output(p, x, out), AttentionCache(keys, values, slots, cache.length + t)


def attention_shared(
    p: Params, c: ModelConfig, x: jax.Array, segment: jax.Array, cache: AttentionCache
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows that share a past: x [B*Q,T,D] after a cache of B rows (Q questions on each video, apart from one another).

    The cache is read where it lies, never copied per question, and not written. Returns x after the residual, and the
    questions' q [B*Q,T,H,P] with the log-sum-exp [B*Q,H,T] of their rows, for scores over the shared keys.
    """
    q, k, v = _qkv(p, c, x)
    rows, t, heads, width = q.shape
    b = cache.k.shape[0]
    out_own, lse_own = attention(q, k, v, q_segment=segment, kv_segment=segment)
    folded = q.reshape(b, rows // b * t, heads, width)
    out_past, lse_past = attention(
        folded, cache.k, cache.v, q_segment=segment.reshape(b, -1), kv_segment=cache.segment, causal=False
    )
    out_past = out_past.reshape(rows, t, heads, width)
    lse_past = lse_past.reshape(b, heads, rows // b, t).swapaxes(1, 2).reshape(rows, heads, t)
    lse = jnp.logaddexp(lse_own, lse_past)

    def share(part: jax.Array) -> jax.Array:
        return jnp.exp(part - lse).swapaxes(1, 2)[..., None].astype(q.dtype)

    out = out_own * share(lse_own) + out_past * share(lse_past)
    return _output(p, x, out), q, lse
