"""Grouped-query attention, without position encoding (Nemotron-H) or with M-RoPE (Qwen), with a ragged key-value cache."""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import ModelConfig
from hybridvlm.nn.caches import AttentionCache, attention_cache, check_capacity
from hybridvlm.nn.linear import biased
from hybridvlm.nn.projections import join_heads, project_heads
from hybridvlm.ops.attention import attention
from hybridvlm.ops.attention.api import attend_unmasked
from hybridvlm.ops.attention.visual import log_sum_exp
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.norms import rms_norm
from hybridvlm.parallel.sequence import (
    gather_sequence,
    join_keys,
    merge_lse,
    pick_rows,
    row_start,
    sequence_shards,
    write_rows,
    write_slots,
)
from hybridvlm.parallel.tensor import own_channels, psum_tensor

Params = dict[str, jax.Array]
# parameters of a layer that its queries and keys depend on
LOOK_PARAMS = ("norm", "q_proj", "k_proj", "q_bias", "k_bias", "q_norm", "k_norm")


class AttentionStack(nn.Module):
    """The parameters of all attention layers, stacked: norm [n,D] · q_proj [n,D,H*P] · k_proj, v_proj [n,D,K*P] · o_proj [n,H*P,D]
    · with qk_norm also q_norm, k_norm [n,P] · with attention_bias also q_bias, k_bias, v_bias · with output_bias o_bias [n,D]."""

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
        if c.output_bias:
            p["o_bias"] = self.param("o_bias", nn.initializers.zeros, (n, c.width))
        return p


def _qkv(p: Params, c: ModelConfig, x: jax.Array, position: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B,L,D] -> q [B,L,H,P], k and v [B,L,K,P]; position [B,L] or [B,L,3] where the config has a rotary embedding."""
    q, k, v = project_heads(p, c, rms_norm(x, p["norm"], c.norm_eps), position)
    return q, k, v


def _output(p: Params, c: ModelConfig, residual: jax.Array, out: jax.Array) -> jax.Array:
    out = own_channels(c, out.reshape(*out.shape[:2], -1))
    return residual + biased(psum_tensor(c, join_heads(p, out)), p.get("o_bias")).astype(residual.dtype)


def gather_queries(query: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Positions of the query rows: query [B,L] bool -> index [B,capacity] int32 and mask [B,capacity], in order."""
    b, length = query.shape
    slot = jnp.where(query, jnp.cumsum(query, axis=1) - 1, capacity)
    rows = jnp.arange(b)[:, None]
    token_index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    index = jnp.zeros((b, capacity), jnp.int32).at[rows, slot].set(token_index, mode="drop")
    return index, jnp.arange(capacity) < jnp.sum(query, axis=1, keepdims=True)


def attention_layer(
    p: Params,
    c: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    *,
    position: jax.Array | None = None,
    query: jax.Array | None = None,
    query_capacity: int = 0,
    decode_capacity: int = 0,
    one_segment: bool = False,
) -> tuple[jax.Array, AttentionCache, AttentionAux | None]:
    """One residual attention layer over whole rows.

    x [B,L,D], segment [B,L]; position [B,L] or [B,L,3] where the config has a rotary embedding (keys are cached turned).
    `decode_capacity`: empty slots in the cache for tokens to come, of all shards of a row together. `one_segment`: a promise, that of
    `hybridvlm.ops.attention.attention`.
    With `query` [B,L] bool the rows of the question (at most
    `query_capacity` of them) come back in the aux, for the text-to-visual score. Where rows are cut over devices, the aux has
    the whole row's question, its positions counted from the first token here, and the keys of this shard alone.
    """
    q, k, v = _qkv(p, c, x, position)
    length, start = segment.shape[1], row_start(c, segment.shape[1])
    if sequence_shards(c) == 1:
        scored = query is not None
        out, lse = attention(q, k, v, q_segment=segment, kv_segment=segment, one_segment=one_segment, return_lse=scored)
    else:
        keys, values, slots = (gather_sequence(c, a) for a in (k, v, segment))
        index_q = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), segment.shape)
        out, lse = attention(q, keys, values, q_segment=segment, kv_segment=slots, q_index=index_q)
    aux = None
    if query is not None:
        index, mask = gather_queries(gather_sequence(c, query), query_capacity)
        aux = AttentionAux(
            q=pick_rows(c, q, index, mask),
            q_mask=mask,
            q_segment=pick_rows(c, segment, index, mask),
            q_index=index - start,
            k=k,
            lse=pick_rows(c, lse.swapaxes(1, 2), index, mask).swapaxes(1, 2),
        )
    here = -(-decode_capacity // sequence_shards(c))
    return _output(p, c, x, out), attention_cache(k, v, segment, here), aux


def attention_look(
    p: Params,
    c: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    *,
    position: jax.Array,
    query: jax.Array,
    query_capacity: int,
) -> AttentionAux:
    """How this layer would look at a residual stream that it is not given: the aux of `attention_layer`, and no more than that.

    Arguments as there; of p the entries named in LOOK_PARAMS are read. Queries are projected for the question's rows alone,
    keys for every row, values not at all. Where rows are cut over devices, lse is that of the whole row.
    """
    start = row_start(c, segment.shape[1])
    index, mask = gather_queries(gather_sequence(c, query), query_capacity)
    rows = pick_rows(c, x, index, mask)
    (q,) = project_heads(p, c, rms_norm(rows, p["norm"], c.norm_eps), pick_rows(c, position, index, mask), "q")
    (k,) = project_heads(p, c, rms_norm(x, p["norm"], c.norm_eps), position, "k")
    aux = AttentionAux(q=q, q_mask=mask, q_segment=pick_rows(c, segment, index, mask), q_index=index - start, k=k)
    if sequence_shards(c) == 1:
        return aux
    lse = log_sum_exp(q, k, q_segment=aux.q_segment, kv_segment=segment, q_index=aux.q_index)
    return dataclasses.replace(aux, lse=merge_lse(c, lse))


def _merge(*parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over disjoint sets of keys, (out [B,T,H,P], lse [B,H,T]) each, as if it had been over all of them."""
    if len(parts) == 1:
        return parts[0]
    lse = jax.nn.logsumexp(jnp.stack([part for _, part in parts]), axis=0)
    weighted = [part * jnp.exp(mine - lse).swapaxes(1, 2)[..., None] for part, mine in parts]
    return functools.reduce(operator.add, weighted).astype(parts[0][0].dtype), lse


def _past(q: jax.Array, segment: jax.Array, cache: AttentionCache, recent: bool) -> list[tuple[jax.Array, jax.Array]]:
    """q [B,T,H,P] over the cache's prompt and, with `recent`, over what came after it: all of it lies before q."""
    sets = [(cache.k, cache.v, cache.segment)] + ([(cache.new_k, cache.new_v, cache.new_segment)] if recent else [])
    return [
        attend_unmasked(q, k, v, q_segment=segment, kv_segment=slots, causal=False)
        for k, v, slots in sets
        if k.shape[1] > 0
    ]


def extend_cache(
    c: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, cache: AttentionCache
) -> tuple[jax.Array, AttentionCache]:
    """Heads of new tokens over a cache and themselves: q [B,T,H,P], k and v [B,T,K,P], segment [B,T] -> out [B,T,H,P], longer cache.

    Where rows are cut over devices, each attends to the keys that it holds, of the prompt and of what came after, and the parts are
    joined; a new token's keys and values are kept by the device that has its slot.
    """
    t, here = segment.shape[1], cache.new_k.shape[1]
    decode_capacity, start = here * sequence_shards(c), row_start(c, here)
    if t > decode_capacity:
        raise ValueError(
            f"the cache has room for {decode_capacity} new tokens, got {t}; prefill with a larger `decode_capacity`"
        )
    check_capacity(cache, t, "extend takes")
    keys, values, slots = (
        write_slots(c, old, new.astype(old.dtype), cache.length)
        for old, new in ((cache.new_k, k), (cache.new_v, v), (cache.new_segment, segment))
    )
    cache = dataclasses.replace(cache, new_k=keys, new_v=values, new_segment=slots, length=cache.length + t)
    if t == 1:  # a single new token sees every filled slot: no order to check
        out, lse = _merge(*_past(q, segment, cache, recent=True))
    else:
        index = jnp.broadcast_to(start + jnp.arange(here, dtype=jnp.int32), slots.shape)
        index_q = jnp.broadcast_to(cache.length - t + jnp.arange(t, dtype=jnp.int32), segment.shape)
        own = attention(q, keys, values, q_segment=segment, kv_segment=slots, q_index=index_q, kv_index=index)
        out, lse = _merge(own, *_past(q, segment, cache, recent=False))
    return join_keys(c, out, lse)[0], cache


def attention_extend(
    p: Params,
    c: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    cache: AttentionCache,
    position: jax.Array | None = None,
) -> tuple[jax.Array, AttentionCache]:
    """New tokens after a cache: x [B,T,D], segment [B,T] (0 = padding at the end; its slots stay empty), position as above.

    The caller sees to it that the cache has room (as many slots as length + T).
    """
    out, cache = extend_cache(c, *_qkv(p, c, x, position), segment, cache)
    return _output(p, c, x, out), cache


def attention_rest(
    p: Params,
    c: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    cache: AttentionCache,
    position: jax.Array | None = None,
    *,
    at: jax.Array,
    decode_capacity: int = 0,
) -> tuple[jax.Array, AttentionCache, AttentionAux]:
    """The rest of rows that begin in a cache: x [B,T,D], segment [B,T] (0 = padding at the end), position as above.

    Unlike `attention_extend` it puts keys and values where they belong in the row, from position `at` [B] on: cache and aux are
    those of `attention_layer` over the whole row, all of the rest being the question. Nothing may have come after the cache.
    """
    q, k, v = _qkv(p, c, x, position)
    keys, values, slots = (
        write_rows(c, old, new, at) for old, new in ((cache.k, k), (cache.v, v), (cache.segment, segment))
    )
    t, length = segment.shape[1], slots.shape[1]
    start = row_start(c, length)
    index_q = at[:, None] + jnp.arange(t, dtype=jnp.int32)
    index = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), slots.shape)
    out, lse = attention(q, keys, values, q_segment=segment, kv_segment=slots, q_index=index_q, kv_index=index)
    real = segment > 0
    aux = AttentionAux(q=q, q_mask=real, q_segment=segment, q_index=index_q - start, k=keys, lse=merge_lse(c, lse))
    here = -(-decode_capacity // sequence_shards(c))
    return _output(p, c, x, join_keys(c, out, lse)[0]), attention_cache(keys, values, slots, here), aux


def attention_shared(
    p: Params,
    c: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    cache: AttentionCache,
    position: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows that share a past: x [B*Q,T,D] after a cache of B rows (Q questions on each video, apart from one another).

    The cache is read where it lies, never copied per question, and not written. Returns x after the residual, and the
    questions' q [B*Q,T,H,P] with the log-sum-exp [B*Q,H,T] of their rows, for scores over the shared keys.
    """
    q, k, v = _qkv(p, c, x, position)
    rows, t, heads, width = q.shape
    b = cache.k.shape[0]
    own = attention(q, k, v, q_segment=segment, kv_segment=segment)
    folded = q.reshape(b, rows // b * t, heads, width)
    past = [
        (out.reshape(rows, t, heads, width), lse.reshape(b, heads, rows // b, t).swapaxes(1, 2).reshape(rows, heads, t))
        for out, lse in _past(folded, segment.reshape(b, -1), cache, recent=True)
    ]
    out, lse = _merge(own, *past)
    return _output(p, c, x, out), q, lse
