"""What a layer remembers between calls: one entry per layer, None for an MLP."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaCache:
    """conv [B,W-1,channels], the last inputs of the convolution; ssm [B,H,P,N] fp32; segment [B], whose they are."""

    conv: jax.Array
    ssm: jax.Array
    segment: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """The prompt's k, v [B,L,K,P] with segment [B,L] (0 = empty), and after it room for R new tokens.

    L is that layer's own row length, so under reduction each layer has another one. new_k, new_v [B,R,K,P], new_segment
    [B,R]: what came after the prompt; length []: the slot that the next token takes, the same in every example. A decode
    step so writes one slice of a small array and only reads the prompt, which a compiler would copy if it were written.
    """

    k: jax.Array
    v: jax.Array
    segment: jax.Array
    new_k: jax.Array
    new_v: jax.Array
    new_segment: jax.Array
    length: jax.Array


Cache = MambaCache | AttentionCache | None


def attention_cache(k: jax.Array, v: jax.Array, segment: jax.Array, decode_capacity: int) -> AttentionCache:
    """The cache after a prompt: k, v [B,L,K,P], segment [B,L], and `decode_capacity` empty slots for tokens to come."""
    shape = (k.shape[0], decode_capacity, *k.shape[2:])
    empty = jnp.zeros(shape[:2], jnp.int32)
    return AttentionCache(
        k, v, segment, jnp.zeros(shape, k.dtype), jnp.zeros(shape, v.dtype), empty, jnp.zeros((), jnp.int32)
    )


def cache_bytes(caches: tuple[Cache, ...]) -> int:
    """Bytes that the caches hold, all layers and examples together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def check_capacity(caches: Any, tokens: int, asked: str) -> None:
    """ValueError unless every attention cache in `caches` (any tree) has that many free slots; `asked` is what wants them.

    Written beyond the last slot, tokens would take the positions of others without a word. Compiled code cannot raise, so its callers
    ask here, at the price of reading one number.
    """
    found = jax.tree.leaves(caches, is_leaf=lambda leaf: isinstance(leaf, AttentionCache))
    for cache in found:
        if not isinstance(cache, AttentionCache) or isinstance(cache.length, jax.core.Tracer):
            continue
        decode_capacity, taken = cache.new_segment.shape[-1], int(np.max(cache.length))
        if taken + tokens > decode_capacity:
            raise ValueError(
                f"{asked} {tokens} tokens, and the caches have {decode_capacity - taken} of "
                f"{decode_capacity} slots free after the prompt; prefill with a `decode_capacity` of at least {taken + tokens}"
            )


def empty_caches(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> tuple[Cache, ...]:
    """Caches before the first token, with room for `length` of them in every attention layer."""
    entries: list[Cache] = []
    for kind in config.pattern:
        if kind == "M":
            entries.append(
                MambaCache(
                    jnp.zeros((batch, config.conv_kernel - 1, config.conv_width), dtype),
                    jnp.zeros((batch, config.mamba_heads, config.mamba_head_dim, config.ssm_state), jnp.float32),
                    jnp.ones((batch,), jnp.int32),
                )
            )
        elif kind == "*":
            nothing = jnp.zeros((batch, 0, config.kv_heads, config.head_dim), dtype)
            entries.append(attention_cache(nothing, nothing, jnp.zeros((batch, 0), jnp.int32), length))
        else:
            entries.append(None)
    return tuple(entries)
