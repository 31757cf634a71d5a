"""Embedding and head whose tokens are cut over tensor-parallel devices, and the choice of a token from cut logits.

Each device holds the rows of V/t tokens. An embedding is one sum over devices, of which one has the row. Logits stay where they
are made, [B,V/t] on each: the likeliest token takes one gather of a value and a number per device and example, and the smallest
set of tokens that holds a given probability is found by halving (32 sums of one number per example), so that nobody sorts or
gathers [B,V]. On one device all of this is the ordinary computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from hybridvlm.config import ModelConfig
from hybridvlm.parallel.tensor import LocalConfig, all_gather_param


def vocab_is_cut(c: ModelConfig) -> TypeGuard[LocalConfig]:
    """Whether a device holds only some of the tokens."""
    return isinstance(c, LocalConfig) and c.vocab_devices > 1


def _sum(c: ModelConfig, part: jax.Array) -> jax.Array:
    return jax.lax.psum(part, c.axis) if vocab_is_cut(c) else part


def _first_token(c: ModelConfig, here: int) -> jax.Array | int:
    """The id of the first of the `here` tokens that this device holds."""
    return jax.lax.axis_index(c.axis) * here if vocab_is_cut(c) else 0


def embed_tokens(c: ModelConfig, embed: jax.Array, ids: jax.Array) -> jax.Array:
    """embed [V,D], or a device's rows of it, ids [...] -> [...,D]."""
    embed = all_gather_param(c, "embed", embed, embed.dtype)
    if not vocab_is_cut(c):
        return jnp.take(embed, ids, axis=0)
    local = ids - _first_token(c, embed.shape[0])
    mine = (local >= 0) & (local < embed.shape[0])
    rows = jnp.take(embed, jnp.clip(local, 0, embed.shape[0] - 1), axis=0)
    return _sum(c, jnp.where(mine[..., None], rows, 0))


def project_to_vocab(c: ModelConfig, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Final hidden states [...,D] -> logits [...,V] float32, or those of this device's tokens [...,V/t]."""
    if c.tie_embeddings:
        weight = all_gather_param(c, "embed", params["embed"], x.dtype).T
    else:
        weight = all_gather_param(c, "lm_head", params["lm_head"], x.dtype)
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def likeliest(c: ModelConfig, logits: jax.Array) -> jax.Array:
    """The first token with the largest of logits [B,V] (on each device its own) -> [B] int32."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if vocab_is_cut(c):
        value = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
        values, tokens = jax.lax.all_gather((value, best + _first_token(c, logits.shape[-1])), c.axis)
        best = jnp.take_along_axis(tokens, jnp.argmax(values, axis=0)[None], axis=0)[0]
    return best


def gumbel_noise(c: ModelConfig, keys: jax.Array, here: int) -> jax.Array:
    """Noise [B,here] of this device's tokens, one key per example; a token's is the same however the vocabulary is cut."""
    devices = c.vocab_devices if vocab_is_cut(c) else 1
    whole = jax.vmap(lambda key: jax.random.gumbel(key, (here * devices,), jnp.float32))(keys)
    return jax.lax.dynamic_slice_in_dim(whole, _first_token(c, here), here, axis=1)


def keep_likeliest(c: ModelConfig, logits: jax.Array, top_p: float) -> jax.Array:
    """Logits [B,V] with -inf for all but the likeliest tokens that hold probability `top_p` together, of equals the first."""
    largest = jnp.max(logits, axis=-1)
    if vocab_is_cut(c):
        largest = jax.lax.pmax(largest, c.axis)
    weight = jnp.exp(logits - largest[:, None])
    enough = top_p * _sum(c, jnp.sum(weight, axis=-1))
    # float32 as integers of the same order
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    rank = jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)

    def above(limit: jax.Array) -> jax.Array:
        return _sum(c, jnp.sum(jnp.where(rank > limit[:, None], weight, 0.0), axis=-1))

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # what lies above `high` is not enough, what lies above `low` is
        middle = (low & high) + ((low ^ high) >> 1)
        short = above(middle) < enough
        return jnp.where(short, low, middle), jnp.where(short, middle, high)

    ends = jnp.full(largest.shape, -(2**31), jnp.int32), jnp.full(largest.shape, 2**31 - 1, jnp.int32)
    _, limit = jax.lax.fori_loop(0, 32, halve, ends)
    tied = rank == limit[:, None]
    before = jnp.cumsum(tied, axis=-1) - tied
    if vocab_is_cut(c):
        counts = jax.lax.all_gather(jnp.sum(tied, axis=-1), c.axis)
        earlier = jnp.arange(c.vocab_devices)[:, None] < jax.lax.axis_index(c.axis)
        before = before + jnp.sum(jnp.where(earlier, counts, 0), axis=0)[:, None]
    kept = (rank > limit[:, None]) | (tied & (above(limit)[:, None] + before * weight < enough[:, None]))
    return jnp.where(kept, logits, -jnp.inf)
