"""Rotary position embedding, for the families that have it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def apply_rope(x: jax.Array, position: jax.Array, theta: float = 10000.0, fraction: float = 1.0) -> jax.Array:
    """Turn each pair (i, i + R/2) of the first R = fraction * P channels by position * theta ** (-2i/R) radians.

    x [B,L,H,P] queries or keys; position [B,L] int32 or float, in tokens; channels from R on pass through.
    Angles and rotation in fp32; returns [B,L,H,P] in x.dtype. Raises ValueError if R is not an even number of channels.
    """
    if x.ndim != 4 or position.shape != x.shape[:2]:
        raise ValueError(f"position: expected [B,L] for x [B,L,H,P], got {position.shape} for x {x.shape}")
    width = x.shape[-1]
    rotated = round(fraction * width)
    if not 0 <= rotated <= width or rotated % 2 or abs(rotated - fraction * width) > 1e-6:
        raise ValueError(
            f"fraction: expected an even number of the {width} channels to rotate, got {fraction} ({fraction * width})"
        )
    if rotated == 0:
        return x
    rate = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angle = (position.astype(jnp.float32)[..., None] * rate)[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
    return turned if rotated == width else jnp.concatenate([turned, x[..., rotated:]], axis=-1)
