"""Mixing of bits: what checksums and scores without a seed of their own are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mix32(words: jax.Array) -> jax.Array:
    """A finaliser of 32 bits (lowbias32), uint32: invertible, and every input bit reaches every output bit."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
    words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
    return words ^ (words >> 16)
