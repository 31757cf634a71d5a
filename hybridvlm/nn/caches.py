"""What a layer remembers between calls: one entry per layer, None for an MLP."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

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
    """k, v [B,S,K,P] and the segment [B,S] of every slot (0 = empty); length [], the slot that the next token takes.

    S is that layer's own row length plus room for new tokens, so under reduction each layer has another S. New tokens go
    behind the whole row, to the same slot in every example (one slice is written, not B scattered ones); the padding of
    a shorter example stays between its prompt and its answer as empty slots.
    """

    k: jax.Array
    v: jax.Array
    segment: jax.Array
    length: jax.Array


Cache = MambaCache | AttentionCache | None


def cache_bytes(caches: tuple[Cache, ...]) -> int:
    """Bytes that the caches hold, all layers and examples together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def empty_caches(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> tuple[Cache, ...]:
    """Caches before the first token, with `length` slots in every attention layer."""
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
            shape = (batch, length, config.kv_heads, config.head_dim)
            entries.append(
                AttentionCache(
                    jnp.zeros(shape, dtype),
                    jnp.zeros(shape, dtype),
                    jnp.zeros((batch, length), jnp.int32),
                    jnp.zeros((), jnp.int32),
                )
            )
        else:
            entries.append(None)
    return tuple(entries)
